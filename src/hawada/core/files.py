"""Files that this program writes: their checksums, computed once, and names for what is not whole yet. No torch."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from pathlib import Path

SETTLED_NS = 20_000_000  # longer than the coarsest tick of a file system's clock that is still in use
SIGNATURE = re.compile(r"<!-- written by hawada, sha256 ([0-9a-f]{64}) -->\n\Z")
PARTIAL = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?:partial|old)")
_digests: dict[tuple[str, int, int, int, int], str] = {}


def sha256(path: Path) -> str:
    """Hex digest of a file, computed once in a process and again only when the file has changed.

    A file counts as changed when its size, inode or one of its times did. A file that was written a moment ago is left
    to settle first, because a second change within one tick of the clock would not show.
    """
    while (age_ns := time.time_ns() - path.stat().st_mtime_ns) in range(SETTLED_NS):
        time.sleep((SETTLED_NS - age_ns) / 1e9)
    key = _identity(path)
    if key not in _digests:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if _identity(path) != key:
            return digest  # it changed meanwhile
        _digests[key] = digest
    return _digests[key]


def _identity(path: Path) -> tuple[str, int, int, int, int]:
    found = path.stat()
    return str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def partial_path(path: Path) -> Path:
    """A new hidden name beside `path` for what will be renamed to it once it is whole; nobody else's file has it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def whole_name(name: str) -> str:
    """The name that a file or folder gets once it is whole: the inverse of `partial_path` on names."""
    match = PARTIAL.fullmatch(name)
    return match["name"] if match else name


def signed(text: str) -> str:
    """Markdown with a last line by which it is known again as long as nobody edits it."""
    return f"{text}<!-- written by hawada, sha256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_signed(path: Path) -> bool:
    """Whether a file holds what `signed` returned, unedited."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        return False
    match = SIGNATURE.search(text)
    return match is not None and signed(text[: match.start()]) == text
