"""What a key of the configuration may be: numbers with bounds, choices, names, lists and mappings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")
TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


class Value(Protocol):
    """What a key may be. `str` of it completes "the value is not …"."""

    def problem(self, key: str, value: Any) -> str | None:
        """The beginning of a sentence about what is wrong with a value, or None where nothing is."""
        ...


@dataclass(frozen=True)
class Number:
    """A number within bounds.

    Attributes:
        low: the smallest value.
        high: the largest value.
        above: whether `low` itself is left out.
        whole: whether fractions are refused.
        alone: whether `low`, a whole number, is a value on its own, and the next is `low + 2`.
        infinite: whether infinity is a value too.
    """

    low: float
    high: float
    above: bool = False
    whole: bool = False
    alone: bool = False
    infinite: bool = False

    def problem(self, key: str, value: Any) -> str | None:
        """See `Value`."""
        good = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        if good and self.infinite and value == math.inf:
            return None
        if good and self.whole:
            good = isinstance(value, int)
        if good and self.alone:
            good = value != self.low + 1
        good = good and (value > self.low if self.above else value >= self.low) and value <= self.high
        return None if good else f"{key}: {_shown(value)} is not {self}"

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.alone:
            kind, lower = f"{self.low:g} or {kind}", f"of at least {self.low + 2:g}"
        else:
            lower = f"above {_plain(self.low)}" if self.above else f"of at least {_plain(self.low)}"
        return f"{kind} {lower} and at most {_plain(self.high)}" + (", or .inf" if self.infinite else "")


@dataclass(frozen=True)
class Choice:
    """One of a few values.

    Attributes:
        values: the values.
        by_text: whether a value counts that only reads like one of them (`1.1` for `"1.1"`).
    """

    values: tuple[Any, ...]
    by_text: bool = False

    def problem(self, key: str, value: Any) -> str | None:
        """See `Value`."""
        found = (str(value) if self.by_text else value) in self.values
        if found and isinstance(value, bool) != any(value is each for each in self.values if isinstance(each, bool)):
            found = False  # 0 and 1 equal false and true
        return None if found else f"{key}: {value!r} is not {self}"

    def __str__(self) -> str:
        return f"one of {', '.join(str(value) for value in self.values)}"


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def problem(self, key: str, value: Any) -> str | None:
        """See `Value`."""
        return None if isinstance(value, bool) else f"{key}: {_shown(value)} is not {self}"

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Text:
    """A text that is not empty and has no control characters.

    Attributes:
        free: whether it may be empty and may have line breaks and the like.
    """

    free: bool = False

    def problem(self, key: str, value: Any) -> str | None:
        """See `Value`."""
        good = isinstance(value, str) and (self.free or bool(value.strip() and not CONTROL_CHARACTERS.search(value)))
        return None if good else f"{key}: {_shown(value)} is not {self}"

    def __str__(self) -> str:
        return "a text" if self.free else "a text with something in it and no control characters"


@dataclass(frozen=True)
class Name:
    """One component of a path."""

    def problem(self, key: str, value: Any) -> str | None:
        """See `Value`."""
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        good = isinstance(text, str) and bool(text.strip()) and text not in (".", "..") and len(text.encode()) <= 200
        good = good and not CONTROL_CHARACTERS.search(text) and not set(text) & set("/\\")
        return None if good else f"{key}: {_shown(value)} is not {self}"

    def __str__(self) -> str:
        return "a name of one folder (no slash, no backslash, no control character, and neither empty nor . or ..)"


@dataclass(frozen=True)
class Target:
    """The import path of a class or function."""

    def problem(self, key: str, value: Any) -> str | None:
        """See `Value`."""
        good = isinstance(value, str) and TARGET.fullmatch(value)
        return None if good else f"{key}: {_shown(value)} is not {self}"

    def __str__(self) -> str:
        return "the import path of a class or function, such as mypackage.parts.Mine"


@dataclass(frozen=True)
class ListOf:
    """A list with something in it.

    Attributes:
        each: what each entry is.
        length: how many there must be; None for any number.
        or_one: whether a single entry may stand without brackets.
    """

    each: Value
    length: int | None = None
    or_one: bool = False

    def problem(self, key: str, value: Any) -> str | None:
        """See `Value`."""
        if self.or_one and not isinstance(value, list):
            return self.each.problem(key, value)
        if not isinstance(value, list) or not value or len(value) != (self.length or len(value)):
            return f"{key}: {_shown(value)} is not {self}"
        return next((found for entry in value if (found := self.each.problem(key, entry))), None)

    def __str__(self) -> str:
        count = "" if self.length is None else f"{self.length} "
        return (f"{self.each}, or " if self.or_one else "") + f"a list of {count}values, each {self.each}"


@dataclass(frozen=True)
class MappingOf:
    """Values by name.

    Attributes:
        each: what each value is; None for anything.
        names: the names that there are; None for any.
    """

    each: Value | None = None
    names: Sequence[str] | None = None

    def problem(self, key: str, value: Any) -> str | None:
        """See `Value`."""
        if not isinstance(value, Mapping):
            return f"{key}: {_shown(value)} is not {self}"
        for name, inner in value.items():
            if self.names is not None and name not in self.names:
                return f"{key}.{name}: {name} is not one of {', '.join(self.names)}"
            found = self.each.problem(f"{key}.{name}", inner) if self.each else None
            if found:
                return found
        return None

    def __str__(self) -> str:
        names = "" if self.names is None else f" of {', '.join(self.names)}"
        return f"a mapping{names}" + (f", to {self.each}" if self.each else "")


@dataclass(frozen=True)
class Node:
    """An object that is made of its `_target_` and the keys beside it."""

    def problem(self, key: str, value: Any) -> str | None:
        """See `Value`."""
        if not isinstance(value, Mapping) or "_target_" not in value:
            return f"{key}: {_shown(value)} is not {self}"
        return Target().problem(f"{key}._target_", value["_target_"])

    def __str__(self) -> str:
        return "a node with _target_ and the arguments beside it"


@dataclass(frozen=True)
class Nested:
    """A text, or lists and mappings of texts and numbers, none of them empty; what reads them checks the rest."""

    def problem(self, key: str, value: Any) -> str | None:
        """See `Value`."""
        if isinstance(value, str) and value.strip():
            return None
        if isinstance(value, list | Mapping) and _is_filled(value):
            return None
        return f"{key}: {_shown(value)} is not {self}"

    def __str__(self) -> str:
        return "a text, a list or a mapping with something in it"


def _is_filled(value: Any) -> bool:
    """Whether lists and mappings hold texts and whole numbers, or such lists and mappings."""
    if isinstance(value, list | Mapping):
        inner = list(value.values()) if isinstance(value, Mapping) else value
        return bool(inner) and all(_is_filled(each) for each in inner)
    return type(value) is int or (isinstance(value, str) and bool(value.strip()))


def _shown(value: Any) -> str:
    """A value as a message shows it: text that could be mistaken for nothing, or breaks a line, in quotes."""
    quoted = isinstance(value, str) and (not value.strip() or CONTROL_CHARACTERS.search(value))
    return repr(value) if quoted else str(value)


def _plain(number: float) -> str:
    """A bound as people write it."""
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"
