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
WANTED = ".json or .jsonl (either also .gz)"


@dataclass(frozen=True)
class QAExample:
    """One question on one text.

    Attributes:
        context: the text, as it is in the data.
        question: without white space around it.
        answers: every one that counts as right, repetitions included; none when the context does not answer.
        id: of the data, or a hash of context and question where it has none.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    id: str


@dataclass(frozen=True)
class QAData:
    """Questions to train on and to test on; no context is in both.

    Attributes:
        train: in the order of the data, or chosen ones in an order of their own.
        test: in the order of the data.
    """

    train: Sequence[QAExample]
    test: Sequence[QAExample]


@dataclass(frozen=True)
class Source:
    """Where questions come from.

    Attributes:
        name: on the hub, owner/name; its validation split is for testing, as the real test answers are not public.
        configuration: one of the hub's.
        read: a row into an example, or a `ValueError` that says what the row lacks.
        wanted: which local files serve instead, in words.
    """

    name: str
    configuration: str
    read: Callable[[Any], QAExample]
    wanted: str


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
        path: local files instead: a file, a folder or a glob of .json or .jsonl, either also .gz. Files whose names
            have the word test (or else valid, validation, dev) are the test split; without such, or with nothing
            else, some contexts are held out.
        version: of the hub's data, 1.1 or 2.0; local files have what they have.
        samples: train on only so many questions, the same random ones every time; more contain fewer.
        test_fraction: of contexts held out, chosen by their content.
        unanswerable: keep the questions without an answer, a third of version 2.0's training and half of its test
            questions, as its published scores do; False leaves them out of both splits.

    Raises:
        ValueError: when the data is not there or is something else, or a number is out of range.
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
        path: local files instead, see `squad`.
        samples: likewise; all of the training questions take more than a gigabyte of memory.
        test_fraction: likewise.

    Raises:
        ValueError: when the data is not there or is something else, or a number is out of range.
    """
    return _load(path, HOTPOTQA, samples=samples, test_fraction=test_fraction)


def _squad_example(row: Any) -> QAExample:
    context, question = _text(row, "context"), _text(row, "question")
    if row.get("is_impossible"):  # what answers there are, are only plausible
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
        # Sentences begin with the space that parts them from the one before.
        lines = [
            f"{_text(part, 'title')}: {''.join(part['sentences']).strip()}" for part in _paragraphs(row["context"])
        ]
    except (KeyError, TypeError, ValueError):
        lines = []
    if not lines:
        raise ValueError("has no titles with sentences in 'context'")
    return _example(row, "\n".join(lines), question, (answer,))


def _paragraphs(context: Any) -> list[dict[str, Any]]:
    """Titles with sentences of what HotpotQA's files have, pairs, or the hub, two columns."""
    if isinstance(context, dict):
        context = zip(context["title"], context["sentences"], strict=True)
    return [
        part if isinstance(part, dict) else dict(zip(("title", "sentences"), part, strict=True)) for part in context
    ]


SQUAD_FILES = "SQuAD's own .json, or .json or .jsonl rows of context, question and answers"
HOTPOTQA_FILES = "HotpotQA's distractor files, .json or .jsonl rows of question, answer and context (titles, sentences)"
SQUAD = {
    "1.1": Source("rajpurkar/squad", "plain_text", _squad_example, SQUAD_FILES),
    "2.0": Source("rajpurkar/squad_v2", "squad_v2", _squad_example, SQUAD_FILES),
}
HOTPOTQA = Source("hotpotqa/hotpot_qa", "distractor", _hotpotqa_example, HOTPOTQA_FILES)


def _example(row: dict[str, Any], context: str, question: str, answers: Iterable[str]) -> QAExample:
    name = row.get("id", row.get("_id"))
    return QAExample(
        context, question.strip(), tuple(answers), _digest(context, question) if name is None else str(name)
    )


def _text(row: Any, key: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"has no text in {key!r}")
    return value


def _digest(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()


def _splits(path: str | None, source: Source) -> tuple[Iterable[QAExample], Iterable[QAExample] | None]:
    """Examples to train on and to test on; None for the latter where some of the former are to be held out."""
    if path is None:
        hub = hub_splits(source.name, source.configuration, ("train", "validation"), wanted=source.wanted)
        train, test = (_examples(split, source, source.name) for split in hub)
        return train, test
    training, testing = (
        [_examples(_rows(file, source.wanted), source, str(file)) for file in files]
        for files in local_files(path, suffix=SUFFIX, wanted=WANTED)
    )
    return chain(*training), chain(*testing) if testing else None


def _rows(file: Path, wanted: str) -> Iterator[Any]:
    """The questions of a file, one at a time; of SQuAD's own format each with the context of its paragraph."""
    try:
        # Windows begins UTF-8 with a mark, which "utf-8-sig" drops.
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
            if SUFFIX.search(file.name)[1]:  # type: ignore[index]
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
        raise ValueError(f"data.path: {file} has a paragraph without {error}; set data.path to {wanted}") from None
    except Exception as error:  # whatever gzip and json raise, or other people's nesting
        raise unreadable(str(file), error, wanted) from error


def _examples(rows: Iterable[Any], source: Source, place: str) -> Iterator[QAExample]:
    for number, row in enumerate(rows, 1):
        try:
            example = source.read(row)
        except ValueError as error:
            raise ValueError(
                f"data.path: question {number} of {place} {error}; set data.path to {source.wanted}"
            ) from None
        yield example


def _load(
    path: str | None,
    source: Source,
    *,
    samples: int | None,
    test_fraction: float,
    keep: Callable[[QAExample], bool] = lambda example: True,
) -> QAData:
    """Both splits; examples are read once, and those that are not chosen do not stay in memory."""
    check_count("samples", samples)
    check_test_fraction(test_fraction)
    given, testing = _splits(path, source)
    test = list(filter(keep, testing or ()))
    contexts = {example.context for example in test}

    def rest() -> Iterator[QAExample]:
        for example in filter(keep, given):
            if testing is None and held_out(example.context, test_fraction):
                test.append(example)
            elif example.context not in contexts:
                yield example

    # Chosen by content: the same ones in whatever order they come, and a larger choice contains the smaller.
    train = list(rest()) if samples is None else heapq.nsmallest(samples, rest(), key=_lot)
    for name, examples in (("training", train), ("test", test)):
        if not examples:
            raise ValueError(
                f"data: the {name} split has no question; give more questions, a file with dev in its name, or "
                "another data.test_fraction"
            )
    return QAData(train, test)


def _lot(example: QAExample) -> str:
    return _digest(example.id, example.question, example.context)
