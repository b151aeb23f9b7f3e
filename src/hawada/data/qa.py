"""Questions on a text and their answers: SQuAD and HotpotQA, from the hub or from local files."""

from __future__ import annotations

import gzip
import hashlib
import heapq
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from hawada.data.corpus import check_count, check_test_fraction, held_out, hub_splits, local_files, unreadable

SUFFIX = re.compile(r"\.json(l?)(\.gz)?$")
SUFFIXES = ".json or .jsonl (either also .gz)"


@dataclass(frozen=True)
class QAExample:
    """One question on one text.

    Attributes:
        context: the text, as it is in the data.
        question: the question, without white space around it.
        answers: every answer that counts as right, repetitions included; none when the context does not answer.
        id: the id in the data, or a hash of context and question where there is none.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    id: str


@dataclass(frozen=True)
class QAData:
    """Questions to train on and to test on; no context is in both.

    Attributes:
        train: the training questions in the order of the data; if only some are chosen, in a fixed random order.
        test: the test questions in the order of the data.
    """

    train: Sequence[QAExample]
    test: Sequence[QAExample]


@dataclass(frozen=True)
class QuestionSource:
    """A data set of questions, on the hub or in local files.

    Attributes:
        name: the data set on the hub, owner/name; its validation split is for testing, as the answers of its test
            split are not public.
        configuration: the configuration on the hub.
        parse: a function that makes an example of a row, or raises a `ValueError` that tells what the row has not.
        files: a description of the local files that can be used instead, for messages.
    """

    name: str
    configuration: str
    parse: Callable[[Any], QAExample]
    files: str


def squad(
    path: str | None = None,
    version: str = "1.1",
    *,
    samples: int | None = None,
    test_fraction: float = 0.1,
    unanswerable: bool = True,
) -> QAData:
    """SQuAD (Rajpurkar et al., 2016, 2018): questions whose answers are spans of a paragraph of Wikipedia.

    The hub's validation split is the test split. Local files may be SQuAD's own, or rows of context, question and
    `answers` (texts, or the hub's columns) or `answer`.

    Args:
        path: local files to use instead: a file, a folder or a glob of .json or .jsonl, either also .gz. Files whose
            names have the word test (or else valid, validation, dev) are the test split; without such files, or with
            only such files, some contexts are held out.
        version: the version of the hub's data, 1.1 or 2.0; it does not matter for local files.
        samples: the number of training questions, the same random ones every time; a larger number contains those of
            a smaller one. None means all.
        test_fraction: the fraction of contexts to hold out, chosen by their content.
        unanswerable: whether to keep the questions without an answer, a third of version 2.0's training and half of
            its test questions, as its published scores do; False leaves them out of both splits.

    Raises:
        ValueError: when the data is missing or of another format, or when a number is out of range.
    """
    if str(version) not in SQUAD:
        raise ValueError(f"data.version: SQuAD has no version {version}; set data.version to {' or '.join(SQUAD)}")
    return _load(
        path,
        SQUAD[str(version)],
        samples=samples,
        test_fraction=test_fraction,
        keep=lambda example: unanswerable or bool(example.answers),
    )


def hotpotqa(path: str | None = None, *, samples: int | None = None, test_fraction: float = 0.1) -> QAData:
    """HotpotQA (Yang et al., 2018), distractor setting: questions that take two of ten paragraphs of Wikipedia.

    The context is all paragraphs in the order of the data, a line each: `title: sentences`. An answer is a span of
    it, or yes or no. The hub's validation split is the test split.

    Args:
        path: local files to use instead, see `squad`.
        samples: the number of training questions, see `squad`; all of them take more than a gigabyte of memory.
        test_fraction: the fraction of contexts to hold out, chosen by their content.

    Raises:
        ValueError: when the data is missing or of another format, or when a number is out of range.
    """
    return _load(path, HOTPOTQA, samples=samples, test_fraction=test_fraction)


def _squad_example(row: Any) -> QAExample:
    context, question = _text(row, "context"), _text(row, "question")
    if row.get("is_impossible"):  # where there are answers, they are only plausible
        return _example(row, context, question, ())
    answers = row.get("answers", row.get("answer"))
    if isinstance(answers, dict):
        answers = answers.get("text")
    texts: list[Any] = [
        answer.get("text") if isinstance(answer, dict) else answer
        for answer in (answers if isinstance(answers, list) else [answers])
    ]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("has no text in 'answers'")
    return _example(row, context, question, (text for text in texts if text.strip()))


def _hotpotqa_example(row: Any) -> QAExample:
    question, answer = _text(row, "question"), _text(row, "answer")
    try:
        # A sentence begins with the space that separates it from the one before.
        lines = [
            f"{_text(part, 'title')}: {''.join(part['sentences']).strip()}" for part in _paragraphs(row["context"])
        ]
    except (KeyError, TypeError, ValueError):
        lines = []
    if not lines:
        raise ValueError("has no titles with sentences in 'context'")
    return _example(row, "\n".join(lines), question, (answer,))


def _paragraphs(context: Any) -> list[dict[str, Any]]:
    """Bring the pairs of HotpotQA's files and the two columns of the hub into one form: titles with sentences."""
    if isinstance(context, dict):
        context = zip(context["title"], context["sentences"], strict=True)
    return [
        part if isinstance(part, dict) else dict(zip(("title", "sentences"), part, strict=True)) for part in context
    ]


SQUAD_FILES = "SQuAD's own .json, or .json or .jsonl rows of context, question and answers"
HOTPOTQA_FILES = "HotpotQA's distractor files, .json or .jsonl rows of question, answer and context (titles, sentences)"
SQUAD = {
    "1.1": QuestionSource("rajpurkar/squad", "plain_text", _squad_example, SQUAD_FILES),
    "2.0": QuestionSource("rajpurkar/squad_v2", "squad_v2", _squad_example, SQUAD_FILES),
}
HOTPOTQA = QuestionSource("hotpotqa/hotpot_qa", "distractor", _hotpotqa_example, HOTPOTQA_FILES)


def _example(row: dict[str, Any], context: str, question: str, answers: Iterable[str]) -> QAExample:
    """Make an example with the id of its row, or one of its own where the row has none."""
    name = row.get("id", row.get("_id"))
    return QAExample(
        context, question.strip(), tuple(answers), _digest(context, question) if name is None else str(name)
    )


def _text(row: Any, key: str) -> str:
    """Return the text of a row under a key; the error continues a sentence that names the row."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"has no text in {key!r}")
    return value


def _digest(*texts: str) -> str:
    """Hash texts into a short hexadecimal number."""
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()


def _splits(path: str | None, source: QuestionSource) -> tuple[Iterable[QAExample], Iterable[QAExample] | None]:
    """Read the examples to train on and to test on; None for the latter if some of the former are to be held out."""
    if path is None:
        hub = hub_splits(source.name, source.configuration, ("train", "validation"), files=source.files)
        train, test = (_examples(split, source, source.name) for split in hub)
        return train, test
    training, testing = (
        [_examples(_rows(file, source.files), source, str(file)) for file in files]
        for files in local_files(path, suffix=SUFFIX, suffixes=SUFFIXES)
    )
    return chain(*training), chain(*testing) if testing else None


def _rows(file: Path, files: str) -> Iterator[Any]:
    """Read the questions of a file one at a time; in SQuAD's own format, each gets the context of its paragraph."""
    try:
        # Windows puts a byte-order mark before UTF-8, which "utf-8-sig" drops.
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
            if SUFFIX.search(file.name)[1]:  # type: ignore[index]  # `local_files` returns only names that match
                entries: Iterable[Any] = (json.loads(line) for line in lines if line.strip())
            else:
                content = json.load(lines)
                entries = content.get("data", [content]) if isinstance(content, dict) else content
            for entry in entries:
                if not isinstance(entry, dict) or "paragraphs" not in entry:
                    yield entry
                    continue
                for paragraph in entry["paragraphs"]:
                    yield from ({**question, "context": paragraph["context"]} for question in paragraph["qas"])
    except KeyError as error:
        raise ValueError(f"data.path: {file} has a paragraph without {error}; set data.path to {files}") from None
    except Exception as error:  # gzip and json raise many kinds, and so does an unknown nesting
        raise unreadable(str(file), error, files) from error


def _examples(rows: Iterable[Any], source: QuestionSource, place: str) -> Iterator[QAExample]:
    """Parse rows; errors name the number of the row and the place."""
    for number, row in enumerate(rows, 1):
        try:
            example = source.parse(row)
        except ValueError as error:
            raise ValueError(
                f"data.path: question {number} of {place} {error}; set data.path to {source.files}"
            ) from None
        yield example


def _load(
    path: str | None,
    source: QuestionSource,
    *,
    samples: int | None,
    test_fraction: float,
    keep: Callable[[QAExample], bool] = lambda example: True,
) -> QAData:
    """Load both splits; examples are read once, and those that are not chosen do not stay in memory."""
    check_count("samples", samples)
    check_test_fraction(test_fraction)
    given, testing = _splits(path, source)
    test = list(filter(keep, testing or ()))
    contexts = {example.context for example in test}

    def train_examples() -> Iterator[QAExample]:
        for example in filter(keep, given):
            if testing is None and held_out(example.context, test_fraction):
                test.append(example)
            elif example.context not in contexts:
                yield example

    # They are chosen by content, so that their order in the data does not matter, and so that a larger choice contains
    # the smaller ones.
    train = list(train_examples()) if samples is None else heapq.nsmallest(samples, train_examples(), key=_random_key)
    for name, examples in (("training", train), ("test", test)):
        if not examples:
            raise ValueError(
                f"data: the {name} split has no question; give more questions, a file with dev in its name, or "
                "another data.test_fraction"
            )
    return QAData(train, test)


def _random_key(example: QAExample) -> str:
    """A key that orders examples at random, but always alike."""
    return _digest(example.id, example.question, example.context)
