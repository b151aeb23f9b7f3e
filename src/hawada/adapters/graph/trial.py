"""The trial of a declaration: a model that is cut by it must run, with the shapes that are expected of it.

Code may have a number of channels written into it, as the heads of `view(batch, tokens, 12, 64)`. Where the cut model
fails or has another shape, either an attribute of a module follows the number of channels from then on, or the channels
stay.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from hawada.adapters.graph.declaration import Declaration
from hawada.adapters.graph.labels import STAYS, Field
from hawada.adapters.graph.trace import Call, Op, Trace, Value, record
from hawada.core.structure import Keep, materialize

MAX_TRIALS = 80
Following = tuple[str, int, str, int, int]  # the arguments of `Declaration`: tensor, axis, attribute, times, divided by
WRITTEN = "has the number of channels written into code"


@dataclass(frozen=True)
class Fault:
    """Where a cut model does otherwise than expected.

    Attributes:
        op: The operator of the uncut model at which it shows.
        reason: What happens there.
    """

    op: Op
    reason: str


def declare(trace: Trace, *, stream: bool) -> Declaration:
    """Declare the groups of a traced model and try them out until the cut model runs as expected.

    Raises:
        ValueError: Nothing can be removed; the message names the first operator that keeps its channels.
    """
    kept: list[tuple[Op, Field, str]] = []
    following: list[Following] = []
    tried: dict[int, int] = {}  # how many ways were tried at an operator
    last: list[Following] = []
    for _ in range(MAX_TRIALS):
        declared = Declaration(trace, stream=stream, kept=kept, attributes=following)
        fault = find_fault(declared) if declared.groups else None
        if fault is None:
            break
        if tried.get(fault.op.index):
            following = [entry for entry in following if entry not in last]  # it did not help
        ways = _ways_to_follow(declared, fault.op)
        number = tried.get(fault.op.index, 0)
        tried[fault.op.index] = number + 1
        if number < len(ways):
            last = [entry for op in _alike(trace, fault.op) for entry in _follow(declared, op, ways[number])]
            following = following + last
            continue
        last = []
        more = [(op, labels, WRITTEN) for op in _alike(trace, fault.op) for labels in _touching(declared, op)]
        kept += more or [(fault.op, labels, WRITTEN) for labels in _around(declared, fault.op)]
    else:
        kept += [(trace.ops[-1], np.arange(1, declared.walk.labels.count), "could not be cut so that the model runs")]
        declared = Declaration(trace, stream=stream, kept=kept)
    declared.check()
    return declared


def find_fault(declared: Declaration) -> Fault | None:
    """Cut the model to random widths and run it; return the first operator that does otherwise than expected."""
    trace = declared.trace
    keep = random_keep(declared)
    expected = _Expected(declared, keep)
    slim = materialize(trace.model, declared.groups, keep)
    found = record(slim, trace.given, "cpu" if trace.computed else "meta")
    if trace.computed:  # what operators follow may depend on values
        return None if found.error is None else Fault(trace.ops[min(len(found.ops), len(trace.ops) - 1)], str(found.error))
    for op, again in zip(trace.ops, found.ops, strict=False):
        if op.name != again.name:
            return Fault(op, f"{again.name} runs in its place")
        for value, cut in zip(op.outputs, again.outputs, strict=False):
            followed = value is op.output or value.users  # statistics that nobody asks for have any shape
            if followed and expected.shape(value) != cut.shape:
                return Fault(op, f"the shape is {cut.shape} and not {expected.shape(value)}")
    if found.error is not None:
        return Fault(trace.ops[min(len(found.ops), len(trace.ops) - 1)], str(found.error))
    return None


def random_keep(declared: Declaration, seed: int = 0) -> Keep:
    """Between a third and two thirds of the units of every group, drawn at random; branches stay."""
    draw = random.Random(seed)
    keep = {}
    for group in declared.groups:
        count = draw.randint(max(1, group.units // 3), max(1, 2 * group.units // 3))
        keep[group.name] = tuple(range(1)) if group.removes else tuple(sorted(draw.sample(range(group.units), count)))
    return keep


class _Expected:
    """The shapes that values have in a cut model."""

    def __init__(self, declared: Declaration, keep: Keep) -> None:
        self.declared = declared
        self.stays = np.ones(len(declared.channels), bool)
        for group, units in zip(declared.groups, declared.units, strict=True):
            if not group.removes:
                self.stays[units] = False
                self.stays[units[list(keep[group.name])]] = True

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape that a value has in the cut model."""
        shape = list(value.shape)
        for field in self.declared.walk.fields(value):
            stays = self.stays[self.declared.channels[field]]
            for axis in range(field.ndim):
                others = tuple(other for other in range(field.ndim) if other != axis)
                here = stays.any(axis=others)
                if not here.all():
                    shape[axis] = int(here.sum())
        return tuple(shape)


def _touching(declared: Declaration, op: Op) -> list[Field]:
    """The labels of groups that an operator touches."""
    fields = [field for value in (*op.inputs, *op.outputs) for field in declared.walk.fields(value)]
    labels = [np.unique(field) for field in fields]
    return [own for own in labels if (declared.holder[declared.channels[own]] >= 0).any()]


def _around(declared: Declaration, op: Op) -> list[Field]:
    """The labels of groups that the modules around an operator touch, of the innermost that touches any."""
    for call in (*reversed(op.calls), None):
        ops = declared.trace.ops if call is None else declared.trace.ops[call.start : call.end]
        found = [labels for inner in ops for labels in _touching(declared, inner)]
        if found:
            return found
    return []


def _ways_to_follow(declared: Declaration, op: Op) -> list[tuple[int, int, str, int]]:
    """Attributes that may hold a number of channels, as (which output, axis, attribute, which of the calls around)."""
    ways = []
    for number in range(1, len(op.calls) + 1):
        module = declared.trace.module(op.calls[-number])
        for output, value in enumerate(op.outputs[:1]):
            for field in declared.walk.fields(value):
                for axis, size in enumerate(value.shape):
                    if field.shape[axis] == 1:
                        continue
                    ways += [(output, axis, name, number) for name in _holding(module, size)]
    return ways


def _holding(module: nn.Module, size: int) -> Iterator[str]:
    for name, value in vars(module).items():
        if not name.startswith("_") and type(value) is int and value == size:
            yield name


def _follow(declared: Declaration, op: Op, way: tuple[int, int, str, int]) -> list[Following]:
    """Let an attribute of a module around an operator follow an axis of the operator's output."""
    output, axis, attribute, number = way
    if output >= len(op.outputs) or number > len(op.calls) or axis >= len(op.outputs[output].shape):
        return []
    value, call = op.outputs[output], op.calls[-number]
    size = value.shape[axis]
    if getattr(declared.trace.module(call), attribute, None) != size:
        return []
    channels: set[int] = set()
    for field in declared.walk.fields(value):
        if field.shape[axis] > 1:
            channels |= set(np.unique(declared.channels[field]))
    for place in declared.walk.places:
        own = set(np.unique(declared.channels[place.labels]))
        if own == channels and own != {STAYS}:
            count = len(place.labels)
            if count % size == 0:
                return [(place.tensor, place.dim, f"{call.path}.{attribute}", 1, count // size)]
            if size % count == 0:
                return [(place.tensor, place.dim, f"{call.path}.{attribute}", size // count, 1)]
    return []


def _alike(trace: Trace, op: Op) -> list[Op]:
    """The operator, and the same one in calls of other modules of the same class."""
    if not op.calls:
        return [op]
    inner = op.calls[-1]
    kind, offset = type(trace.module(inner)), op.index - inner.start
    found = [op]
    for call in _calls_of(trace, kind):
        index = call.start + offset
        if call is not inner and index < call.end and trace.ops[index].name == op.name:
            if trace.ops[index].calls[-1] is call:
                found.append(trace.ops[index])
    return found


def _calls_of(trace: Trace, kind: type[nn.Module]) -> Sequence[Call]:
    return [call for call in trace.calls if type(trace.module(call)) is kind]
