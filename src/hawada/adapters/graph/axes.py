"""The axis of an activation that holds channels, and where operators that change shapes move it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from hawada.adapters.graph.trace import VALUE_META_KEY

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Axis:
    """The axis of an activation that holds channels.

    Attributes:
        dim: The index of the axis, counted from the front.
        labels: For each element of the axis, the number of its channel.
    """

    dim: int
    labels: Labels


def value(node: fx.Node) -> Any:
    """Return the value that a node evaluates to."""
    return node.meta[VALUE_META_KEY]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call, by its position or else by its name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def flattened(node: fx.Node, axis: Axis) -> Axis | str:
    """Follow the channels through `torch.flatten`."""
    return flatten(axis, _given(node).shape, argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1))


def flatten(axis: Axis, shape: Any, start: int, end: int) -> Axis | str:
    """Merge the axes from `start` to `end`; a string is returned as the reason where channels cannot be followed."""
    start, end = start % len(shape), end % len(shape)
    if start >= end or axis.dim < start:
        return axis
    if axis.dim > end:
        return Axis(axis.dim - (end - start), axis.labels)
    if np.prod(shape[start : axis.dim]) != 1:
        return "mixes channels with the axes before them"
    return Axis(start, np.repeat(axis.labels, int(np.prod(shape[axis.dim + 1 : end + 1]))))


def viewed(node: fx.Node, axis: Axis) -> Axis | str:
    """Follow `view` and `reshape`; of their targets only `(batch, -1)` leaves the number of channels open."""
    sizes: Any = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
    shape = _given(node).shape
    if axis.dim == 1 and len(sizes) == 2 and sizes[1] == -1 and value(node).shape[0] == shape[0]:
        return flatten(axis, shape, 1, -1)
    return "has the number of channels written into code"


def reduced(node: fx.Node, axis: Axis) -> Axis | str:
    """Follow means, sums and maxima over other axes."""
    rank, dims = _given(node).dim(), argument(node, 1, "dim")
    listed = [dim % rank for dim in ([dims] if isinstance(dims, int) else dims or range(rank))]
    if axis.dim in listed:
        return "sums over channels"
    gone = 0 if argument(node, 2, "keepdim", False) else sum(dim < axis.dim for dim in listed)
    return Axis(axis.dim - gone, axis.labels)


def permuted(node: fx.Node, axis: Axis) -> Axis | str:
    """Follow the channels through `permute`."""
    dims: Any = argument(node, 1, "dims")
    listed: Any = dims if isinstance(dims, list | tuple) else node.args[1:]
    order = [dim % _given(node).dim() for dim in listed]
    return Axis(order.index(axis.dim), axis.labels)


def transposed(node: fx.Node, axis: Axis) -> Axis | str:
    """Follow the channels through `transpose`."""
    first, second = (argument(node, 1 + side, f"dim{side}") % _given(node).dim() for side in (0, 1))
    return Axis({first: second, second: first}.get(axis.dim, axis.dim), axis.labels)


def unsqueezed(node: fx.Node, axis: Axis) -> Axis | str:
    """Follow the channels through `unsqueeze`."""
    dim = argument(node, 1, "dim") % value(node).dim()
    return Axis(axis.dim + (dim <= axis.dim), axis.labels)


def selected(node: fx.Node, axis: Axis) -> Axis | str:
    """Follow slices of other axes, and new axes."""
    index: Any = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    slices = [part for part in index if part is not None]
    if not all(isinstance(part, slice) for part in slices):
        return "selects elements by something other than slices"
    if len(slices) > axis.dim and slices[axis.dim] != slice(None):
        return "selects channels by number"
    new = sum(part is None and sum(p is not None for p in index[:at]) <= axis.dim for at, part in enumerate(index))
    return Axis(axis.dim + new, axis.labels)


def padded(node: fx.Node, axis: Axis) -> Axis | str:
    """Follow padding of other axes."""
    widths: Any = argument(node, 1, "pad", ())
    own = 2 * (_given(node).dim() - 1 - axis.dim)  # the pairs of widths begin with the last axis
    zero = argument(node, 3, "value") in (None, 0, 0.0)
    if zero and isinstance(widths, list | tuple) and not any(widths[own : own + 2]):
        return axis
    return "pads by a number of channels that is written into code, or with something else than 0"


# For each operator that changes shapes, the function that follows the channel axis through it.
AXIS_RULES: dict[str, Callable[[fx.Node, Axis], Axis | str]] = {
    "flatten": flattened,
    "view": viewed,
    "reshape": viewed,
    "mean": reduced,
    "sum": reduced,
    "amax": reduced,
    "permute": permuted,
    "transpose": transposed,
    "unsqueeze": unsqueezed,
    "getitem": selected,
    "pad": padded,
}


def takes_size(node: fx.Node, axis: Axis) -> bool:
    """Return whether a `size`, `shape` or similar operator hands on the number of channels.

    The sizes of other axes do not change when channels go.
    """
    rank, asks = _given(node).dim(), argument(node, 1, "dim")
    if node.target == "dim" or (node.target is getattr and asks != "shape"):
        return False
    if isinstance(asks, int):
        return bool(asks % rank == axis.dim)
    users = [user for user in node.users if user.users]
    for user in users:
        index: Any = user.args[1] if len(user.args) > 1 else None
        if not isinstance(index, int | slice) or getattr(user.target, "__name__", "") != "getitem":
            return True
        if axis.dim in np.ravel(np.arange(rank)[index]):
            return True
    return False


def _given(node: fx.Node) -> Tensor:
    """Return the tensor that an operator is called with, on the meta device."""
    given = node.args[0]
    assert isinstance(given, fx.Node)
    tensor: Tensor = value(given)
    return tensor
