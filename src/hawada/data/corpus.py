"""Sources of documents: local files, the hub, and the interpreter's own standard library."""

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

MIN_DOCUMENT_CHARACTERS, MAX_DOCUMENT_CHARACTERS = 2_000, 10_000  # of running text that is cut into documents
TITLE_SEARCH_LINES = 200  # of a file, in which a title shows that it is WikiText
LOADERS = {"txt": "from_text", "jsonl": "from_json", "parquet": "from_parquet"}  # methods of `datasets.Dataset`
SUFFIX = re.compile(r"\.(txt|jsonl|parquet)(\.(gz|bz2|xz|zst))?$")
TEXT_SUFFIXES = ".txt, .jsonl (either also .gz, .bz2, .xz or .zst) or .parquet"
TEXT_FILES = f"UTF-8 text: {TEXT_SUFFIXES}"
TEST_NAME, VALIDATION_NAME = (
    re.compile(rf"(?<![a-z])({word})(?![a-z])", re.IGNORECASE) for word in ("test(set)?", "valid(ation)?|dev")
)
TITLE_LINE = re.compile(r"\s?= (?!= ).+ =\s*")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Gather = Callable[[Iterable[str]], Iterable[str]]
# Documents for training and for testing; None for the latter means that some of the former are to be held out.
Splits = tuple[Iterable[str], Iterable[str] | None]


def check_count(key: str, value: int | None) -> None:
    """Check that a value is a whole number of at least 1, or None.

    Raises:
        ValueError: when it is not.
    """
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"data.{key}: {value} is not a whole number of at least 1; set data.{key} to one")


def check_test_fraction(value: float) -> None:
    """Check that a fraction lies between 0 and 1.

    Raises:
        ValueError: when it does not.
    """
    if not 0 < value < 1:
        raise ValueError(f"data.test_fraction: {value} is not between 0 and 1; set it to a fraction")


def held_out(document: str, fraction: float) -> bool:
    """Decide by its content alone whether a document belongs to the test split."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Cut running text into documents.

    A document ends at the first blank line after 2,000 characters (paragraphs and their blank lines stay together, so
    that stories, speeches and articles keep their context), or at the first line end after 10,000.
    """
    document: list[str] = []
    size = 0
    for line in lines:
        document.append(line)
        size += len(line) + 1
        if size >= MAX_DOCUMENT_CHARACTERS or (size >= MIN_DOCUMENT_CHARACTERS and not line.strip()):
            yield "\n".join(document).strip()
            document, size = [], 0
    yield "\n".join(document).strip()


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Gather WikiText's lines into articles, each from its title, ` = Title = `, to the next."""
    article: list[str] = []
    for line in lines:
        if TITLE_LINE.fullmatch(line) and article:
            yield "\n".join(article).strip()
            article = []
        article.append(line.rstrip("\n"))
    yield "\n".join(article).strip()


def articles_or_paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Gather articles where one of the first lines is a title, else paragraphs: local files need not be WikiText."""
    rest = iter(lines)
    first = list(islice(rest, TITLE_SEARCH_LINES))
    gather = articles if any(TITLE_LINE.fullmatch(line) for line in first) else paragraphs
    yield from gather(chain(first, rest))


def local_texts(path: str | None, column: str, *, gather: Gather | None = None) -> Splits:
    """Read the documents of the training and of the test files; see `local_files`.

    Args:
        path: a file, a folder or a glob.
        column: the column of .jsonl and .parquet that holds the text; a row is a document unless `gather` is given.
        gather: a function that makes documents of rows, or of the lines of .txt; None means `paragraphs` for .txt.
    """
    train, test = local_files(path)
    return _file_documents(train, column, gather), _file_documents(test, column, gather) if test else None


def local_files(
    path: str | None, *, suffix: re.Pattern[str] = SUFFIX, suffixes: str = TEXT_SUFFIXES
) -> tuple[list[Path], list[Path]]:
    """Find the training and the test files.

    A file is for testing when its name, or that of a folder below `path`, has the word test. Where no file is, those
    with the word valid, validation or dev are for testing; otherwise these are left out. Where there are neither, or
    only such files, every file is for training.

    Args:
        path: a file, a folder or a glob.
        suffix: the pattern that the names of usable files match.
        suffixes: the same suffixes in words, for the message.

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
        raise ValueError(f"data.path: {path} has no {suffixes} file; convert the text to one of them")
    test = [file for file in usable if TEST_NAME.search(names[file])]
    validation = [file for file in usable if VALIDATION_NAME.search(names[file]) and file not in test]
    train = [file for file in usable if file not in test and file not in validation]
    return (train, test or validation) if train else (usable, [])


def _file_documents(files: Iterable[Path], column: str, gather: Gather | None) -> Iterator[str]:
    from datasets import Dataset

    for file in files:
        kind = SUFFIX.search(file.name)[1]  # type: ignore[index]  # `local_files` returns only names that match
        try:
            # From the file itself: load_dataset would count the load over the network and copy the text into a cache.
            dataset = getattr(Dataset, LOADERS[kind])(glob.escape(str(file)), streaming=True)
        except StopIteration:  # an empty file
            continue
        except Exception as error:  # the parsers of three formats and four compressions raise many kinds
            raise unreadable(str(file), error) from error
        rows = read_rows(dataset, "text" if kind == "txt" else column, source=str(file))
        chosen = gather or (paragraphs if kind == "txt" else None)
        yield from rows if chosen is None else chosen(rows)


def read_rows(dataset: Any, column: str, *, source: str) -> Iterator[str]:
    """Read the texts of one column, in order.

    Args:
        dataset: a data set of the `datasets` library, streamed or not.
        column: the name of the column.
        source: the name of the data set in messages.

    Raises:
        ValueError: when the column is missing or holds no text, or when the source cannot be read.
    """
    batches = dataset.iter(batch_size=1000)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # a stream is parsed only now, and raises the same errors
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
    """Read the documents of the training and the test split of a data set on the hub; see `hub_splits`."""
    splits = hub_splits(name, configuration, ("train", "test"), streaming=streaming)
    train, test = (read_rows(split, "text", source=name) for split in splits)
    return (train, test) if gather is None else (gather(train), gather(test))


def hub_splits(
    name: str, configuration: str | None, splits: Sequence[str], *, streaming: bool = False, files: str = TEXT_FILES
) -> list[Any]:
    """Load splits of a data set from the local cache, or else from the hub.

    Args:
        name: the name of the data set, owner/name.
        configuration: one of the data set's configurations; None means its only one.
        splits: the names of the splits on the hub.
        streaming: whether to download rows only when they are read.
        files: a description of the local files that can be used instead, for messages.

    Raises:
        ValueError: when it is not in the cache, and the hub does not respond within 5 s or does not have it.
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
        except Exception as error:  # `datasets` and the network raise many kinds
            raise unreadable(name, error, files) from error


def reachable(url: str, timeout_s: float = 5.0) -> bool:
    """Test whether a server responds in time, the look-up of its name included, and through a proxy if one is set."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # documented, but not listed in __all__

    responses: list[Any] = []

    def ask() -> None:
        with suppress(Exception):
            responses.append(get_session().head(url, timeout=timeout_s))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(responses)


def interpreter_texts(limit_bytes: int) -> Iterator[str]:
    """Read text that every interpreter carries: pydoc's topics, then each standard module's docstrings as one document.

    Modules are parsed, not imported; tests are left out. A docstring that occurred before is not repeated.

    Args:
        limit_bytes: the most bytes of UTF-8; reading stops before the document that would exceed them.
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
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                new = [text for text in dict.fromkeys(docstrings(Path(place, name).read_bytes())) if text not in seen]
                seen.update(new)
                yield "\n\n".join(new)


def docstrings(source: bytes) -> list[str]:
    """List the docstrings of a module, its classes and functions in their order; none if it cannot be parsed."""
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


def unreadable(source: str, error: Exception, files: str = TEXT_FILES) -> ValueError:
    """Make the error to raise for a file or data set that cannot be parsed.

    Args:
        source: the file or the data set.
        error: what its parser raised.
        files: a description of files that can be read, for the remedy.
    """
    reason = " ".join(str(error).split()) or type(error).__name__
    remedy = "install the package zstandard" if "zstd" in reason else f"set data.path to {files}"
    return ValueError(f"data.path: {source} cannot be read ({reason}); {remedy}")
