"""The trial of a declaration: a model that is cut by it must run, with the shapes that are expected of it.

Code may have a number of channels written into it, as the heads of `view(batch, tokens, 12, 64)`. Where the cut model
fails or has another shape, either an attribute of a module follows the number of channels from then on, or the channels
stay.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import nn
from torch.utils import _pytree as pytree

from hawada.adapters.graph.attention import tie_heads
from hawada.adapters.graph.declaration import Declaration, Following, Remedies
from hawada.adapters.graph.labels import Field, axes_of
from hawada.adapters.graph.norms import find_norms
from hawada.adapters.graph.trace import Op, Trace, Value, record
from hawada.core.structure import Group, Keep, attribute_of, materialize

MAX_TRIALS = 80
ONLY_MEMORY = {"clone", "contiguous", "as_strided", "alias", "detach", "_to_copy"}
WITH_NUMBERS = {"add", "sub", "rsub", "mul", "div", "pow", "clamp"}
ALIASES = {"_unsafe_view": "view", "reshape": "view", "_reshape_alias": "view"}
TRIED_KEEPS = 2  # a number that fits one cut by chance does not fit another
ADDED_OPERATORS = 50  # at most, that only move memory and that a cut model runs before an operator in addition
MAX_CALLS_AROUND = 3  # modules around an operator whose attributes may have a say in it
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
    norms = find_norms(trace)
    remedies = before = tie_heads(Declaration(trace, stream=stream, norms=norms))
    attempts: Counter[Op] = Counter()  # how many ways were tried at an operator
    pending: Op | None = None  # the operator at which the last attempt should have helped
    earlier: Declaration | None = None  # the one that the last attempt changed
    for _ in range(MAX_TRIALS):
        declared = Declaration(trace, stream=stream, remedies=remedies, norms=norms)
        fault = find_fault(declared) if declared.groups else None
        if fault is None:
            break
        op = fault.op
        if pending is not None and earlier is not None and op.index <= pending.index:
            op, remedies, declared = pending, before, earlier  # the attempt did not help
        before, earlier, ways = remedies, declared, _ways(declared, op)
        if attempts[op] < len(ways):
            remedies, pending = _with_way(declared, remedies, op, ways[attempts[op]]), op
        else:
            remedies, pending = replace(remedies, kept=(*remedies.kept, *_to_keep(declared, op))), None
        attempts[op] += 1
    else:
        everything = np.arange(1, declared.walk.labels.count)
        kept = (trace.ops[-1], everything, "could not be cut so that the model runs")
        declared = Declaration(trace, stream=stream, remedies=Remedies(kept=(kept,)))
    declared.check()
    return declared


def find_fault(declared: Declaration) -> Fault | None:
    """Cut the model to some widths and run it; return the first operator that does otherwise than expected."""
    keeps = [random_keep(declared, seed) for seed in range(TRIED_KEEPS)]
    # Code that divides channels in proportion fits random ones by chance, but not the first or the last; and groups of
    # few units have the same width by chance, but not where one of them stays whole.
    keeps += [{name: _run_of(group, last=last) for name, group in _by_name(declared)} for last in (False, True)]
    keeps += [_some_whole(declared, seed) for seed in range(TRIED_KEEPS)]
    earliest: Fault | None = None
    for keep in keeps:
        limit = None if earliest is None else earliest.op.index + ADDED_OPERATORS
        fault = _fault_of(declared, keep, limit)
        if fault is not None and (earliest is None or fault.op.index < earliest.op.index):
            earliest = fault
    return earliest


def _fault_of(declared: Declaration, keep: Keep, limit: int | None) -> Fault | None:
    trace = declared.trace
    expected = _Expected(declared, keep)
    slim = materialize(trace.model, declared.groups, keep)
    found = record(slim, trace.given, limit)
    unseen = [norm.call for norm in declared.walk.norms]  # the walk does not look into a norm
    done = -1
    for op, again in zip(_computing(trace.ops), _computing(found.ops), strict=False):
        done = op.index
        if any(op in call for call in unseen):
            continue
        if ALIASES.get(op.name, op.name) != ALIASES.get(again.name, again.name):
            return Fault(op, f"{again.name} runs in its place")
        if op.name in WITH_NUMBERS and _numbers(op) != _numbers(again):
            return Fault(op, "a number depends on how many channels there are")
        for value, cut in zip(op.outputs, again.outputs, strict=False):
            followed = value is op.output or value.users  # statistics that nobody asks for have any shape
            if followed and expected.shape(value) != cut.shape:
                return Fault(op, f"the shape is {cut.shape} and not {expected.shape(value)}")
    if found.error is not None:
        following = (op for op in _computing(trace.ops) if op.index > done)
        return Fault(next(following, trace.ops[-1]), str(found.error))
    return None


def _numbers(op: Op) -> list[float]:
    """The numbers among an operator's arguments."""
    return [leaf for leaf in pytree.tree_leaves((op.args, op.kwargs)) if type(leaf) in (int, float)]


def _computing(ops: list[Op]) -> Iterator[Op]:
    """The operators without those that only depend on how a tensor lies in memory."""
    return (op for op in ops if op.name not in ONLY_MEMORY)


def _by_name(declared: Declaration) -> list[tuple[str, Group]]:
    return [(group.name, group) for group in declared.groups]


def _run_of(group: Group, *, last: bool) -> tuple[int, ...]:
    """The first or the last third of a group's units."""
    if group.removes:
        return (0,)
    count = _least(group)
    return tuple(range(group.units - count, group.units) if last else range(count))


def _least(group: Group) -> int:
    """A third of a group's units, but not 1 of several: torch runs other operators on an axis of size 1."""
    return max(group.units // 3, min(2, group.units // 2), 1)


def _some_whole(declared: Declaration, seed: int) -> Keep:
    """Some groups whole, drawn at random, and the first third of the others."""
    draw = random.Random(seed)
    whole = {name: draw.random() < 0.5 for name, _ in _by_name(declared)}
    return {
        name: tuple(range(group.units)) if whole[name] else _run_of(group, last=False)
        for name, group in _by_name(declared)
    }


def random_keep(declared: Declaration, seed: int = 0) -> Keep:
    """Between a third and two thirds of the units of every group, drawn at random; branches stay."""
    draw = random.Random(seed)
    keep = {}
    for group in declared.groups:
        count = draw.randint(_least(group), max(_least(group), 2 * group.units // 3))
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


def _to_keep(declared: Declaration, op: Op) -> list[tuple[Op, Field, str]]:
    """What stays when nothing helps at an operator: what it touches, or else what the modules around it touch."""
    for alike in (_alike(declared.trace, op), [op]):
        found = [(other, labels, WRITTEN) for other in alike for labels in _touching(declared, other)]
        if found:
            return found
    for call in (*reversed(op.calls), None):
        ops = declared.trace.ops if call is None else declared.trace.ops[call.start : call.end]
        found = [(op, labels, WRITTEN) for inner in ops for labels in _touching(declared, inner)]
        if found:
            return found
    return []


def _touching(declared: Declaration, op: Op) -> list[Field]:
    """The labels of groups that an operator touches."""
    fields = [field for value in (*op.inputs, *op.outputs) for field in declared.walk.fields(value)]
    labels = [np.unique(field) for field in fields]
    return [own for own in labels if (declared.holder[declared.channels[own]] >= 0).any()]


@dataclass(frozen=True)
class Way:
    """A way to make a cut model run.

    Attributes:
        attributes: Attributes that follow an axis, as (attribute, which of the calls around, from the innermost on, is
            that of its module, which of the operator's tensors, counted through outputs and inputs, its axis).
        tied: The place among the calls around whose input has as many channels as the operator has elements; None for
            none.
    """

    attributes: tuple[tuple[str, int, int, int], ...] = ()
    tied: int | None = None


def _ways(declared: Declaration, op: Op) -> list[Way]:
    """What may help where a cut model does otherwise than expected, the simplest first."""
    found: dict[int, list[tuple[str, int, int, int]]] = {}  # by the tensor of the operator
    inner = len(op.calls) - 1 or len(op.calls)  # the whole model has numbers of many meanings
    around = range(1, min(inner, MAX_CALLS_AROUND) + 1)
    for index, value in enumerate((*op.outputs, *op.inputs)):
        for field in declared.walk.fields(value):
            if not (declared.holder[declared.channels[field]] >= 0).any():
                continue
            for axis in axes_of(field):
                for number in around:
                    module = declared.trace.module(op.calls[-number])
                    places = [index] if len(op.outputs) > 1 else [axis, 0]  # in a list of sizes or a shape
                    names = [name for place in places for name in _holding(module, value.shape[axis], place)]
                    found.setdefault(index, []).extend((name, number, index, axis) for name in dict.fromkeys(names))
    single = [Way((attribute,)) for attributes in found.values() for attribute in attributes]
    pieces = [found.get(index, []) for index in range(len(op.outputs))]
    together = _of_pieces(pieces, found.get(len(op.outputs), [])) if len(pieces) > 1 else []
    ties = [Way(tied=number) for number in around if _tie(declared, op, number)]
    both = [Way(way.attributes, tie.tied) for tie in ties for way in (*together, *single)]
    return list(dict.fromkeys([*together, *single, *ties, *both]))


def _of_pieces(pieces: list[list[tuple[str, int, int, int]]], whole: list[tuple[str, int, int, int]]) -> list[Way]:
    """Let the sizes of several outputs follow at once: elements of a list of sizes, or attributes of their own.

    Args:
        pieces: The attributes that each output's size may be.
        whole: Those of the input's, where what is left for a piece has no attribute of its own.
    """
    listed = [[each for each in attributes if each[0].endswith("]")] for attributes in pieces]
    ways = []
    for chosen in (listed, pieces):
        known = tuple(attributes[0] for attributes in chosen if attributes)
        if known and not all(chosen):
            ways += [Way((*known, each)) for each in whole]
        ways += [Way(known)] if known else []
    return ways


def _with_way(declared: Declaration, remedies: Remedies, op: Op, way: Way) -> Remedies:
    """Add a way at an operator, and at the same one in calls of other modules of its class."""
    following, tied = list(remedies.following), list(remedies.tied)
    for other in _alike(declared.trace, op):
        for attribute in way.attributes:
            for name, labels in _follow(declared, other, *attribute):
                # What one number tells the size of is one set of channels.
                same = [known for path, known in following if path == name and known.size == labels.size]
                tied += [(labels.reshape(-1), known.reshape(-1)) for known in same]
                following.append((name, labels))
        if way.tied is not None:
            tied += _tie(declared, other, way.tied)
    return replace(remedies, following=tuple(following), tied=tuple(tied))


def _holding(module: nn.Module, size: int, position: int) -> list[str]:
    """The attributes of a module that are this whole number, or hold it at a position of a list."""
    found = []
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if type(value) is int and value == size:
            found.append(name)
        elif isinstance(value, list | tuple) and position < len(value) and value[position] == size:
            found.append(f"{name}[{position}]")
    return found


def _tie(declared: Declaration, op: Op, number: int) -> list[tuple[Field, Field]]:
    """Couple the channels of a call's input with as many elements of an operator's result, position by position.

    This is for code that gives the result the number of channels of the input, such as the heads of an attention.
    """
    if number > len(op.calls) or not op.calls[-number].inputs:
        return []
    given = op.calls[-number].inputs[0]
    entering = [field.reshape(-1) for field in declared.walk.fields(given) if len(axes_of(field)) == 1]
    found = []
    for field in declared.walk.fields(op.output):
        for labels in entering:
            if field.size % len(labels) == 0 and field.size >= len(labels) > 1:
                found.append((field.reshape(-1, len(labels)), labels[None]))
    return found


def _follow(declared: Declaration, op: Op, name: str, number: int, index: int, axis: int) -> list[Following]:
    """Let an attribute of a module around an operator follow an axis of one of the operator's tensors."""
    values = (*op.outputs, *op.inputs)
    if index >= len(values) or number > len(op.calls) or axis >= len(values[index].shape):
        return []
    value, call = values[index], op.calls[-number]
    size = value.shape[axis]
    if attribute_of(declared.trace.module(call), name) != size:
        return []
    found = []
    for field in declared.walk.fields(value):
        if field.shape[axis] > 1:
            others = tuple(0 if other != axis else slice(None) for other in range(field.ndim))
            found.append((f"{call.path}.{name}", field[others]))
    return found


def _alike(trace: Trace, op: Op) -> list[Op]:
    """The operator, and the same one in calls of other modules of the same class."""
    if not op.calls:
        return [op]
    inner = op.calls[-1]
    kind, offset = type(trace.module(inner)), op.index - inner.start
    found = [op]
    for call in trace.calls:
        index = call.start + offset
        if call is not inner and index < call.end and type(trace.module(call)) is kind:
            other = trace.ops[index]
            if other.name == op.name and other.calls[-1] is call:
                found.append(other)
    return found
