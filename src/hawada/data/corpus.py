"""Where documents come from: local files, the hub and the interpreter's own standard library."""

from __future__ import annotations

import ast
import glob
import hashlib
import os
import re
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

DOCUMENT_CHARACTERS = 2000
READERS = {"txt": "from_text", "jsonl": "from_json", "parquet": "from_parquet"}
SUFFIX = re.compile(r"\.(txt|jsonl|parquet)(\.(gz|bz2|xz|zst))?$")
WANTED = ".txt, .jsonl (either also .gz, .bz2, .xz or .zst) or .parquet"
TEXT = f"UTF-8 text: {WANTED}"
TEST_NAME, VALIDATION_NAME = (
    re.compile(rf"(?<![a-z])({word})(?![a-z])", re.IGNORECASE) for word in ("test(set)?", "valid(ation)?|dev")
)
TITLE = re.compile(r"\s?= (?!= ).+ =\s*")
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Gather = Callable[[Iterable[str]], Iterable[str]]
# Documents to train on and to test on; None where some of the former are to be held out.
Splits = tuple[Iterable[str], Iterable[str] | None]


def check_count(key: str, value: int | None) -> None:
    """Raises a `ValueError` for what is no whole number of at least 1; None is none given."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"data.{key}: {value} is not a whole number of at least 1; set data.{key} to one")


def check_test_fraction(value: float) -> None:
    """Raises a `ValueError` for what is not between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"data.test_fraction: {value} is not between 0 and 1; set it to a fraction")


def held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the test split; its content alone decides."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Running text cut into documents.

    A document ends at the first blank line after 2,000 characters (paragraphs and their blank lines stay together, so
    that stories, speeches and articles keep their context), or at the first line end after 10,000.
    """
    document: list[str] = []
    size = 0
    for line in lines:
        document.append(line)
        size += len(line) + 1
        if size >= 5 * DOCUMENT_CHARACTERS or (size >= DOCUMENT_CHARACTERS and not line.strip()):
            yield "\n".join(document).strip()
            document, size = [], 0
    yield "\n".join(document).strip()


def articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's lines gathered into articles, each from its title, ` = Title = `, to the next."""
    article: list[str] = []
    for line in lines:
        if TITLE.fullmatch(line) and article:
            yield "\n".join(article).strip()
            article = []
        article.append(line.rstrip("\n"))
    yield "\n".join(article).strip()


def articles_or_paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """`articles` where one of the first lines is a title, else `paragraphs`: local files need not be WikiText."""
    rest = iter(lines)
    first = list(islice(rest, 200))
    gather = articles if any(TITLE.fullmatch(line) for line in first) else paragraphs
    yield from gather(chain(first, rest))


def local_texts(path: str | None, column: str, *, gather: Gather | None = None) -> Splits:
    """Documents of the training and of the test files; see `local_files`.

    Args:
        path: a file, a folder or a glob.
        column: where .jsonl and .parquet have the text; each row is a document unless `gather` is given.
        gather: rows, or lines of .txt, into documents; None: `paragraphs` for .txt.
    """
    train, test = local_files(path)
    return _file_documents(train, column, gather), _file_documents(test, column, gather) if test else None


def local_files(
    path: str | None, *, suffix: re.Pattern[str] = SUFFIX, wanted: str = WANTED
) -> tuple[list[Path], list[Path]]:
    """Training and test files.

    A file is for testing when its name, or a folder below `path`, has the word test. Where there is none, those with
    the word valid, validation or dev are; otherwise these are left out. Without either, or with nothing else, every
    file is for training.

    Args:
        path: a file, a folder or a glob.
        suffix: what the names of usable files match.
        wanted: those in words.

    Raises:
        ValueError: when there is no usable file at all.
    """
    if path is None:
        raise ValueError("data.path: no value is given; set data.path to a local file, folder or glob of text")
    place = Path(path).expanduser()
    if place.is_dir():
        names = {file: str(file.relative_to(place)) for file in place.rglob("*")}
    else:
        found = [place] if place.is_file() else [Path(name) for name in glob.glob(str(place), recursive=True)]
        names = {file: file.name for file in found}
        if not found:
            raise ValueError(f"data.path: {path} does not exist; set data.path to a local file, folder or glob of text")
    usable = [file for file in sorted(names) if suffix.search(file.name) and file.is_file()]
    if not usable:
        raise ValueError(f"data.path: {path} has no {wanted} file; convert the text to one of them")
    test = [file for file in usable if TEST_NAME.search(names[file])]
    validation = [file for file in usable if VALIDATION_NAME.search(names[file]) and file not in test]
    train = [file for file in usable if file not in test and file not in validation]
    return (train, test or validation) if train else (usable, [])


def _file_documents(files: Iterable[Path], column: str, gather: Gather | None) -> Iterator[str]:
    from datasets import Dataset

    for file in files:
        kind = SUFFIX.search(file.name)[1]  # type: ignore[index]
        try:
            # From the file itself: load_dataset would count the load over the network and copy the text into a cache.
            dataset = getattr(Dataset, READERS[kind])(glob.escape(str(file)), streaming=True)
        except StopIteration:  # an empty file
            continue
        except Exception as error:  # whatever the readers of three formats and four compressions raise
            raise unreadable(str(file), error) from error
        rows = read_rows(dataset, "text" if kind == "txt" else column, source=str(file))
        chosen = gather or (paragraphs if kind == "txt" else None)
        yield from rows if chosen is None else chosen(rows)


def read_rows(dataset: Any, column: str, *, source: str) -> Iterator[str]:
    """The texts of one column, in order.

    Args:
        dataset: of the `datasets` library, streamed or not.
        column: name of the column.
        source: what messages call it.

    Raises:
        ValueError: when the column is missing or no text, or the source cannot be read.
    """
    batches = dataset.iter(batch_size=1000)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # as above
            raise unreadable(source, error) from error
        if batch is None:
            return
        values = batch.get(column)
        if values is None or not all(isinstance(value, str | None) for value in values):
            raise ValueError(
                f"data.path: {source} has no column {column!r} of text, only {', '.join(batch)}; choose data=text and "
                "set data.column to the one that holds the text"
            )
        yield from (value for value in values if value is not None)


def hub_texts(name: str, configuration: str | None, *, streaming: bool, gather: Gather | None = None) -> Splits:
    """Documents of the training and the test split of a data set on the hub; see `hub_splits`."""
    splits = hub_splits(name, configuration, ("train", "test"), streaming=streaming)
    train, test = (read_rows(split, "text", source=name) for split in splits)
    return (train, test) if gather is None else (gather(train), gather(test))


def hub_splits(
    name: str, configuration: str | None, splits: Sequence[str], *, streaming: bool = False, wanted: str = TEXT
) -> list[Any]:
    """Splits of a data set on the hub; without network, from the local cache.

    Args:
        name: owner/name.
        configuration: one of the data set's; None: its only one.
        splits: their names there.
        streaming: read rows as they are asked for.
        wanted: which local files serve instead, in words.

    Raises:
        ValueError: when it is not in the cache and the hub does not answer within 5 s, or does not have it.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    try:
        dataset_name = name.partition("/")[2]
        cached = Cache(repo_id=name, dataset_name=dataset_name, config_name=configuration, version="auto", hash="auto")
        return [cached.as_dataset(split=split) for split in splits]
    except (ValueError, OSError) as missing:
        if datasets.config.HF_HUB_OFFLINE or not reachable(datasets.config.HF_ENDPOINT):
            raise ValueError(
                f"data.path: {name} is not in the local cache and {datasets.config.HF_ENDPOINT} cannot be reached; "
                "connect to the network, or set data.path to local files"
            ) from missing
        try:
            return [datasets.load_dataset(name, configuration, split=split, streaming=streaming) for split in splits]
        except Exception as error:  # whatever a hub raises
            raise unreadable(name, error, wanted) from error


def reachable(url: str, timeout_s: float = 5.0) -> bool:
    """Whether a server answers in time, the look-up of its name included; through a proxy where there is one."""
    from huggingface_hub.utils import get_session

    answers: list[Any] = []

    def ask() -> None:
        with suppress(Exception):
            answers.append(get_session().head(url, timeout=timeout_s))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(answers)


def interpreter_texts(limit_bytes: int) -> Iterator[str]:
    """Text that every interpreter carries: pydoc's topics, then each standard module's docstrings as one document.

    Modules are parsed, not imported; tests are left out. A docstring that came before is not repeated.

    Args:
        limit_bytes: stop before the document that would exceed so many.
    """
    size = 0
    for document in _library_documents(Path(sysconfig.get_path("stdlib"))):
        size += len(document.encode())
        if size > limit_bytes:
            return
        yield document


def _library_documents(folder: Path) -> Iterator[str]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics):
        yield topics[name].strip()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - NOT_LIBRARY)
        for name in sorted(names):
            if name.endswith(".py"):
                new = [text for text in dict.fromkeys(docstrings(Path(place, name).read_bytes())) if text not in seen]
                seen.update(new)
                yield "\n\n".join(new)


def docstrings(source: bytes) -> list[str]:
    """Every docstring of a module, its classes and functions, in the order of the source; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return []
    owners = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body
    ]
    owners.sort(key=lambda node: node.body[0].lineno)
    return [text for text in map(ast.get_docstring, owners) if text]


def unreadable(source: str, error: Exception, wanted: str = TEXT) -> ValueError:
    """The error to raise for a file or data set whose reader failed; `wanted` are files that can be read, in words."""
    reason = " ".join(str(error).split()) or type(error).__name__
    remedy = "install the package zstandard" if "zstd" in reason else f"set data.path to {wanted}"
    return ValueError(f"data.path: {source} cannot be read ({reason}); {remedy}")
