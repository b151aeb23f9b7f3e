"""Numbers that modules keep as attributes, or as elements of a list or tuple (`sizes[1]`)."""

from __future__ import annotations

from torch import nn


def attribute_of(owner: nn.Module, name: str) -> object:
    """The attribute of a module, or with `sizes[1]` one element of a list or tuple; None where there is none."""
    attribute, bracket, position = name.partition("[")
    value = getattr(owner, attribute, None)
    if not bracket:
        return value
    index = int(position.rstrip("]"))
    return value[index] if isinstance(value, list | tuple) and index < len(value) else None


def set_attribute(owner: nn.Module, name: str, value: int) -> None:
    """Set the attribute of a module; of a tuple the only element, or with `sizes[1]` that one."""
    attribute, bracket, position = name.partition("[")
    known = getattr(owner, attribute)
    if bracket:
        listed = list(known)
        listed[int(position.rstrip("]"))] = value
        setattr(owner, attribute, type(known)(listed))
    else:
        setattr(owner, attribute, (value,) if isinstance(known, tuple) else value)
