"""Labels: every element of a tensor that may go has the number of the channel that it goes with.

A `Field` gives the elements of a tensor numbers along one of its axes: an integer array with as many axes as the
tensor, of size 1 along those on which the number does not depend. A tensor may have several fields, such as a weight,
whose rows and columns both can go; an element goes when any of its channels does. The number 0 means that it stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Field = NDArray[np.int64]
Fields = tuple[Field, ...]

STAYS = 0  # the label of what must stay


class Labels:
    """Hands out labels and records which of them are the same channel."""

    def __init__(self) -> None:
        self.count = 1
        self._pairs: list[tuple[Field, Field]] = []

    def fresh(self, count: int) -> Field:
        """Hand out new labels, (count,)."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def couple(self, first: Field, second: Field) -> None:
        """Record that channels are the same, element by element; the arrays are broadcast."""
        one, other = np.broadcast_arrays(first, second)
        self._pairs.append((one.ravel(), other.ravel()))

    def keep(self, field: Field) -> None:
        """Record that channels must stay."""
        self.couple(field, np.asarray(STAYS))

    def resolve(self, *, staying: bool = True) -> Field:
        """Return for every label the smallest label of the same channel.

        Args:
            staying: Whether all channels that must stay are one, with the label 0; otherwise they are told apart.
        """
        empty = np.zeros(0, np.int64)
        first, second = (np.concatenate([empty, *(pair[side] for pair in self._pairs)]) for side in (0, 1))
        if not staying:
            both = (first != STAYS) & (second != STAYS)
            first, second = first[both], second[both]
        graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(self.count, self.count))
        component = connected_components(graph, directed=False)[1]
        smallest = np.full(component.max() + 1, self.count)
        np.minimum.at(smallest, component, np.arange(self.count))
        labels: Field = smallest[component]
        return labels


def axes_of(field: Field) -> list[int]:
    """List the axes along which a field differs."""
    return [axis for axis, size in enumerate(field.shape) if size > 1]


def along(labels: Field, axis: int, rank: int) -> Field:
    """Shape labels, (size,), as a field along one axis of a tensor."""
    shape = [1] * rank
    shape[axis] = -1
    return labels.reshape(shape)


def compressed(field: Field) -> Field | None:
    """Drop the axes along which a field does not differ; None when nothing may go."""
    for axis in axes_of(field):
        first = field.take([0], axis)
        if (field == first).all():
            field = first
    return field if field.any() else None


def compress(fields: Iterable[Field | None]) -> Fields:
    """Compress fields and leave out those of which everything stays."""
    small = (compressed(field) for field in fields if field is not None)
    return tuple(field for field in small if field is not None)


def expanded(field: Field, shape: Sequence[int]) -> Field:
    """Give a field the shape of its tensor."""
    return np.broadcast_to(field, tuple(shape))
