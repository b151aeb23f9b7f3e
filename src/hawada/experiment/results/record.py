"""Frozen dataclasses to and from JSON: floats to the last bit, nothing unknown and nothing missing. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

T = TypeVar("T")


def _is_none(value: object) -> bool:
    return value is None


Omitted = Field(exclude_if=_is_none)
OptionalFloat = Annotated[float | None, Omitted]  # what JSON does not hold where it is None
OptionalInt = Annotated[int | None, Omitted]
OptionalStr = Annotated[str | None, Omitted]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass with fields by name alone, which JSON must hold exactly."""
    made = dataclass(frozen=True, kw_only=True)(cls)
    made.__pydantic_config__ = ConfigDict(extra="forbid", ser_json_inf_nan="constants")  # type: ignore[attr-defined]  # pydantic looks for it there
    return made


def to_json(value: Any) -> dict[str, Any]:
    """A record as what `json.dumps` takes."""
    kind: Any = type(value)
    plain: dict[str, Any] = _adapter(kind).dump_python(value, mode="json", by_alias=True)
    return plain


def from_json(kind: Any, plain: object, *, place: str, remedy: str) -> Any:
    """The inverse of `to_json`.

    Args:
        kind: the type, or a union of types, to read.
        plain: what `json.loads` gave.
        place: where it came from, for the message.
        remedy: what helps where it does not fit.

    Raises:
        ValueError: when it is not of that type.
    """
    try:
        return _adapter(kind).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(
            f"{place} is not what this version writes ({where}: {first['msg'].lower()}); {remedy}"
        ) from None


def json_schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a type as `to_json` writes it."""
    return _adapter(kind).json_schema(mode="serialization")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
