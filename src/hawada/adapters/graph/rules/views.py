"""Operators that move elements and compute nothing: a field is moved as its tensor is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hawada.adapters.graph.labels import Field, Fields, along, axes_of, compress, expanded
from hawada.adapters.graph.trace import Op, Value
from hawada.adapters.graph.walk import Walk, rules

VIEWS = rules()


@VIEWS.rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
def reshaped(op: Op, walk: Walk) -> list[Fields]:
    given, made = _given(op), op.output
    return [compress(_reshape(field, given.shape, made.shape) for field in walk.fields(given))]


def _reshape(field: Field, before: Sequence[int], after: Sequence[int]) -> Field:
    """Reshape a field; only the axes that are split or merged take their full size."""
    parts, shape = [], []
    for ours, theirs in _matching(before, after):
        differs = any(field.shape[axis] > 1 for axis in ours)
        parts += [before[axis] if differs else 1 for axis in ours]
        shape += [after[axis] if differs else 1 for axis in theirs]
    return expanded(field, parts).reshape(shape)


def _matching(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Divide the axes of two shapes into the shortest runs that hold equally many elements."""
    runs, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        ours: list[int] = []
        theirs: list[int] = []
        mine = its = 1
        while True:
            if i < len(before) and (mine <= its or j >= len(after)) and not (ours and theirs and mine == its):
                mine, i = mine * before[i], i + 1
                ours.append(i - 1)
            elif j < len(after) and not (ours and theirs and mine == its):
                its, j = its * after[j], j + 1
                theirs.append(j - 1)
            else:
                break
        runs.append((ours, theirs))
    return runs


@VIEWS.rule("permute", "transpose", "t", "numpy_T", "movedim", "squeeze", "unsqueeze", "expand", "squeeze_copy")
def rearranged(op: Op, walk: Walk) -> list[Fields]:
    """The operator itself does it: sizes of 1 stand for any size."""
    return [compress(_rearrange(op, field, _given(op)) for field in walk.fields(_given(op)))]


def _rearrange(op: Op, field: Field, given: Value) -> Field:
    if op.name == "squeeze":  # of all sizes that are 1 in the tensor, not in the field
        gone = op.argument(1, "dim")
        listed = range(len(given.shape)) if gone is None else np.atleast_1d(gone) % max(len(given.shape), 1)
        return field.squeeze(tuple(int(axis) for axis in listed if given.shape[axis] == 1))
    if op.name == "expand":
        new = len(op.output.shape) - len(given.shape)
        return field.reshape((1,) * new + field.shape)
    moved: Field = op.func(as_tensor(field), *op.args[1:], **op.kwargs).numpy()
    return moved


@VIEWS.rule("slice", "select", "narrow")
def sliced(op: Op, walk: Walk) -> list[Fields]:
    given = _given(op)
    axis = op.argument(1, "dim", 0) % len(given.shape)
    whole = op.name == "slice" and given.shape == op.output.shape
    found = []
    for field in walk.fields(given):
        if field.shape[axis] > 1 and not whole:
            if op.name == "select" or op.argument(4, "step", 1) != 1:
                field = walk.collapse(op, field, [axis], "picks channels by their numbers")
                found.append(field if op.name != "select" else field.squeeze(axis))
                continue
            walk.fixed(op, field, axis)
            found.append(_run(op, expanded_on(field, axis, given)))
        else:
            found.append(field if op.name != "select" else field.squeeze(axis))
    return [compress(found)]


@VIEWS.rule("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk")
def divided(op: Op, walk: Walk) -> list[Fields]:
    """Pieces of one size come from code that divides by their number: each keeps the same."""
    given = _given(op)
    axis = op.argument(1 if op.name == "unbind" else 2, "dim", 0) % len(given.shape)
    pieces: list[list[Field]] = [[] for _ in op.outputs]
    for field in walk.fields(given):
        if field.shape[axis] == 1:
            parts = [field.squeeze(axis) if op.name == "unbind" else field] * len(op.outputs)
        else:
            parts = [part.numpy() for part in op.func(as_tensor(field), *op.args[1:], **op.kwargs)]
            if op.name == "unbind":
                if len(axes_of(field)) == 1:  # the pieces have no axis left on which anything could go
                    walk.keep_field(op, field, "takes channels one by one")
                    parts = [np.zeros_like(part) for part in parts]
            else:
                for part in parts[1:]:
                    if part.shape == parts[0].shape:
                        walk.labels.couple(part, parts[0])
        for piece, part in zip(pieces, parts, strict=True):
            piece.append(part)
    return [compress(piece) for piece in pieces]


@VIEWS.rule("flip", "repeat")
def moved(op: Op, walk: Walk) -> list[Fields]:
    """The operator itself moves the labels; what is left of an axis is moved in the same way."""
    given = _given(op)
    return [compress(_run(op, expanded(field, given.shape)) for field in walk.fields(given))]


@VIEWS.rule("roll", "index_select", "unfold")
def moved_elsewhere(op: Op, walk: Walk) -> list[Fields]:
    """Elements of some axes are taken by their numbers, which mean others when channels are gone."""
    given = _given(op)
    rank = len(given.shape)
    dims = op.argument(2, "dims", range(rank)) if op.name == "roll" else [op.argument(1, "dim", 0)]
    if any(walk.fields(value) for value in op.inputs[1:]):
        return walk.stop(op)
    found = [
        walk.collapse(op, field, [int(dim) % rank for dim in dims], "picks channels by their numbers")
        for field in walk.fields(given)
    ]
    if op.name == "unfold":
        return [compress(field[..., None] for field in found)]
    return [compress(found)]


@VIEWS.rule("channel_shuffle", "native_channel_shuffle")
def shuffled(op: Op, walk: Walk) -> list[Fields]:
    """Every group of channels keeps the same ones, so that fewer are shuffled alike."""
    given, groups = _given(op), int(op.args[1])
    for field in walk.fields(given):
        if field.shape[1] > 1:
            table = field.reshape(groups, -1)
            walk.labels.couple(table, table[:1])
    return [compress(_run(op, expanded_on(field, 1, given)) for field in walk.fields(given))]


@VIEWS.rule("pixel_shuffle", "pixel_unshuffle")
def pixels_moved(op: Op, walk: Walk) -> list[Fields]:
    """The channels that make up the pixels of one channel go together."""
    factor = int(op.args[1]) ** 2
    found: list[Field] = []
    for field in walk.fields(_given(op)):
        if [axis - field.ndim for axis in axes_of(field)] != [-3]:
            walk.keep_field(op, field, "makes pixels of what are no channels")
        elif op.name == "pixel_unshuffle":
            found.append(np.repeat(field, factor, axis=-3))
        else:
            table = field.reshape(-1, factor)
            walk.labels.couple(table, table[:, :1])
            found.append(along(table[:, 0], field.ndim - 3, field.ndim))
    return [compress(found)]


@VIEWS.rule("index")
def indexed(op: Op, walk: Walk) -> list[Fields]:
    """Advanced indexing: axes that are not indexed keep their fields, those that are stay whole."""
    given, indices = _given(op), list(op.args[1])
    listed = [axis for axis, index in enumerate(indices) if index is not None]
    first, picks = listed[0], max(len(index.shape) for index in indices if index is not None)
    together = listed == list(range(first, first + len(listed)))
    found: list[Field | None] = []
    for field in walk.fields(given):
        if any(field.shape[axis] > 1 for axis in listed):
            walk.keep_field(op, field, "picks channels by their numbers")
            continue
        rest = field.squeeze(tuple(listed))
        at = first if together else 0
        found.append(rest.reshape(rest.shape[:at] + (1,) * picks + rest.shape[at:]))
    return [compress(found)]


@VIEWS.rule("embedding")
def embedded(op: Op, walk: Walk) -> list[Fields]:
    table, indices = op.args[0], op.args[1]
    rows = [field for field in walk.fields(table) if field.shape[0] > 1]
    for field in rows:
        walk.labels.keep(field)
    columns = [field for field in walk.fields(table) if field.shape[1] > 1]
    for field in columns:
        walk.produce(op, field.reshape(-1))
    return [compress(along(field.reshape(-1), len(indices.shape), len(indices.shape) + 1) for field in columns)]


@VIEWS.rule("gather")
def gathered(op: Op, walk: Walk) -> list[Fields]:
    """The index says which element of one axis is taken; on the others both have the same places."""
    given, axis = _given(op), op.argument(1, "dim") % len(_given(op).shape)
    walk.keep(op, op.args[2], "picks channels by their numbers")
    kept = [field for field in walk.fields(given) if field.shape[axis] == 1]
    for field in walk.fields(given):
        if field.shape[axis] > 1:
            walk.keep_field(op, field, "picks channels by their numbers")
    whole = [field for field in kept if all(op.output.shape[a] == given.shape[a] for a in axes_of(field))]
    for field in kept:
        if not any(field is other for other in whole):
            walk.keep_field(op, field, "picks channels by their numbers")
    return [compress(whole)]


@VIEWS.rule("grid_sampler_2d", "roi_align", "_roi_align")
def sampled(op: Op, walk: Walk) -> list[Fields]:
    """Places of the input are mixed, channel by channel; what says where has none."""
    for value in op.inputs[1:]:
        walk.keep(op, value, "says where something is sampled")
    found = []
    for field in walk.fields(_given(op)):
        if axes_of(field) == [1]:
            found.append(along(field.reshape(-1), 1, len(op.output.shape)))
        else:
            walk.keep_field(op, field, "is sampled along the axis of channels")
    return [compress(found)]


@VIEWS.rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
            "replication_pad2d", "replication_pad3d")  # fmt: skip
def padded(op: Op, walk: Walk) -> list[Fields]:
    """Padding of other axes; elements that are added to an axis of channels are new ones, which stay."""
    given, widths = _given(op), op.argument(1, "pad")
    found: list[Field | None] = []
    for field in walk.fields(given):
        on = {len(given.shape) - 1 - pair for pair in range(len(widths) // 2) if any(widths[2 * pair : 2 * pair + 2])}
        if not on.intersection(axes_of(field)):
            found.append(field)
        elif op.name == "constant_pad_nd":
            found.append(_run(op, expanded(field, given.shape), value=True))
        else:
            walk.keep_field(op, field, "mirrors channels")
    return [compress(found)]


@VIEWS.rule("cat", "concat")
def joined(op: Op, walk: Walk) -> list[Fields]:
    parts: list[Value] = [part for part in op.args[0] if part.shape != (0,)]
    rank = len(op.output.shape)
    axis = op.argument(1, "dim", 0) % rank
    found: list[Field | None] = []
    here = [[field for field in walk.fields(part) if axes_of(field) == [axis]] for part in parts]
    if any(here):
        labels = [
            fields[0].reshape(-1) if fields else np.zeros(part.shape[axis], np.int64)
            for fields, part in zip(here, parts, strict=True)
        ]
        found.append(along(np.concatenate(labels), axis, rank))
    elsewhere = [[field for field in walk.fields(part) if axes_of(field) != [axis]] for part in parts]
    return [compress([*found, *_joined_elsewhere(op, walk, parts, elsewhere, axis)])]


def _joined_elsewhere(
    op: Op, walk: Walk, parts: Sequence[Value], fields: Sequence[Sequence[Field]], axis: int
) -> list[Field]:
    """Fields along other axes than that on which tensors are joined: they are the same in every part."""
    if any(field.shape[axis] > 1 for listed in fields for field in listed):
        shapes = [part.shape for part in parts]
        if all(len(listed) == 1 for listed in fields):
            whole = [expanded_on(listed[0], axis, part) for listed, part in zip(fields, parts, strict=True)]
            common = [max(sizes) for sizes in zip(*(field.shape for field in whole), strict=True)]
            full = [
                expanded(field, [shape[a] if a == axis else common[a] for a in range(len(common))])
                for field, shape in zip(whole, shapes, strict=True)
            ]
            return [np.concatenate(full, axis)]
        for listed in fields:
            for field in listed:
                walk.keep_field(op, field, "is joined along an axis of channels")
        return []
    return walk.merged(op, [(part, listed) for part, listed in zip(parts, fields, strict=True)], but=axis)


@VIEWS.rule("stack")
def stacked(op: Op, walk: Walk) -> list[Fields]:
    parts: list[Value] = list(op.args[0])
    axis = op.argument(1, "dim", 0) % len(op.output.shape)
    fields = [[np.expand_dims(field, axis) for field in walk.fields(part)] for part in parts]
    shaped = [Value((*part.shape[:axis], 1, *part.shape[axis:])) for part in parts]
    return [compress(walk.merged(op, list(zip(shaped, fields, strict=True)), but=axis))]


@VIEWS.rule("as_strided", "as_strided_copy")
def restrided(op: Op, walk: Walk) -> list[Fields]:
    """Another memory format of the same tensor."""
    given = _given(op)
    return [walk.fields(given)] if op.output.shape == given.shape else walk.stop(op)


@VIEWS.rule("copy")
def copied(op: Op, walk: Walk) -> list[Fields]:
    """What is written into a tensor is what it holds from then on."""
    target, source = op.args[:2]
    return [compress(walk.merged(op, [(target, walk.fields(target)), (source, walk.fields(source))]))]


def expanded_on(field: Field, axis: int, given: Value) -> Field:
    """Give a field its tensor's size on one axis."""
    shape = list(field.shape)
    shape[axis] = given.shape[axis]
    return expanded(field, shape)


def as_tensor(field: Field) -> Tensor:
    """A copy of a field as a tensor on the CPU."""
    return torch.from_numpy(np.array(field))


def _run(op: Op, field: Field, *, value: bool = False) -> Field:
    """Run the operator on labels; what is padded gets the label of what stays."""
    arguments: tuple[Any, ...] = (op.args[1], 0) if value else op.args[1:]
    found: Field = op.func(as_tensor(field), *arguments, **({} if value else op.kwargs)).numpy()
    return found


def _given(op: Op) -> Value:
    given: Value = op.args[0]
    return given
