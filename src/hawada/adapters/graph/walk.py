"""The walk over a trace's operators: it gives every value its fields and records which channels are the same.

Each operator has a rule in `rules/`. An operator without one keeps all channels that reach it; a model in which those
stay computes the same as before, whatever the operator is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hawada.adapters.graph.labels import Field, Fields, Labels, along, axes_of, compress
from hawada.adapters.graph.trace import Call, Op, Trace, Value

NormFound = tuple[str, float, int, int]  # kind, eps, axis of the input, number of parts
Rule = Callable[[Op, "Walk"], list[Fields]]

OUTPUT = "makes an output of the model"


class rules:
    """A table of rules: the name of an operator, and what makes the fields of its outputs from those of its inputs."""

    def __init__(self) -> None:
        self.table: dict[str, Rule] = {}

    def rule(self, *names: str) -> Callable[[Rule], Rule]:
        """Enter a function as the rule of these operators."""

        def enter(function: Rule) -> Rule:
            self.table.update(dict.fromkeys(names, function))
            return function

        return enter


@dataclass(frozen=True)
class Place:
    """An axis of a parameter or buffer whose elements belong to channels.

    Attributes:
        tensor: The name of the parameter or buffer.
        dim: The index of the axis.
        labels: For each element, its label.
        role: The operator `produces` new channels, `consumes` (and mixes) them, or `passes` each on by itself.
        op: The operator.
        times: How often the axis repeats on what is consumed (the groups of a convolution).
    """

    tensor: str
    dim: int
    labels: Field
    role: str
    op: Op
    times: int = 1


@dataclass(frozen=True)
class NormPlace:
    """A norm whose statistics run over channels.

    Attributes:
        call: The call of the module that normalises and does nothing else.
        kind: The kind of the norm, as in `Norm`.
        eps: What it adds to the variance.
        dim: The axis of its input that it normalises over.
        parts: The number of parts that have statistics of their own.
        labels: For each element of the axis, its label.
    """

    call: Call
    kind: str
    eps: float
    dim: int
    parts: int
    labels: Field


class Walk:
    """The channels of one trace.

    Attributes:
        labels: Which channels are the same.
        places: The axes of parameters that hold channels, in order of execution.
        norms: The norms that run over channels.
        sums: The additions, with the labels that they joined.
        obstacles: The operators that keep channels, with those channels and the reason.
    """

    def __init__(self, trace: Trace, table: Mapping[str, Rule], norms: Mapping[Call, NormFound]) -> None:
        self.trace, self.table = trace, table
        self.labels = Labels()
        self.places: list[Place] = []
        self.norms: list[NormPlace] = []
        self.sums: list[tuple[Op, Field]] = []
        self.obstacles: list[tuple[Op, Field, str]] = []
        self._fields: dict[Value, Fields] = {}
        self._slices: dict[tuple[Value, int], list[Field]] = {}
        self._axis_of_label: list[tuple[str, int] | None] = [None]
        for name, value in trace.tensors.items():
            self._fields[value] = tuple(self._axes_of_tensor(name, value))
        self._run(norms)
        for value in trace.outputs:
            if value.op is not None:
                self.keep(value.op, value, OUTPUT)
        self._join_slices()
        self._add_other_places()

    def fields(self, value: Value) -> Fields:
        """The fields of a value."""
        return self._fields.get(value, ())

    def tensor_of(self, labels: Field) -> set[tuple[str, int]]:
        """The axes of parameters on which labels were first handed out, as (name, axis)."""
        owners = (self._axis_of_label[label] for label in np.unique(labels))
        return {owner for owner in owners if owner is not None}

    def keep_field(self, op: Op, field: Field, reason: str) -> None:
        """Keep channels at an operator, for a reason that is told."""
        self.obstacles.append((op, np.unique(field), reason))
        self.labels.keep(field)

    def collapse(self, op: Op, field: Field, axes: Iterable[int], reason: str) -> Field:
        """Let what lies along these axes go together, as in a head; all of it stays where there are no other axes."""
        mixed = [axis for axis in axes if field.shape[axis] > 1]
        if not mixed:
            return field
        if len(mixed) == len(axes_of(field)):
            self.keep_field(op, field, reason)
            return np.zeros([1] * field.ndim, np.int64)
        whole = field
        for axis in mixed:
            whole = whole.take([0], axis)
        self.labels.couple(field, whole)
        return whole

    def keep(self, op: Op, value: Value, reason: str) -> None:
        """Keep all channels of one input of an operator."""
        for field in self.fields(value):
            self.keep_field(op, field, reason)

    def stop(self, op: Op, reason: str = "is not understood") -> list[Fields]:
        """Keep all channels that reach an operator; its outputs have none."""
        for value in op.inputs:
            self.keep(op, value, reason)
        return [() for _ in op.outputs]

    def fixed(self, op: Op, field: Field, axis: int) -> None:
        """Record that code takes a run of channels by their positions."""
        value: Value = op.args[0]
        start, end = op.argument(2, "start") or 0, op.argument(3, "end")
        size = value.shape[axis]
        if axes_of(field) == [axis] and op.name == "slice" and op.argument(4, "step", 1) == 1:
            part = field.reshape(-1)[slice(start, None if end is None else min(end, size))]
            self._slices.setdefault((value, axis), []).append(part)

    def produce(self, op: Op, labels: Field) -> None:
        """Record that an operator produces channels: those of an axis of a parameter."""
        self._place(op, labels, "produces")

    def consume(self, op: Op, labels: Field, times: int = 1) -> None:
        """Record that an operator mixes channels by an axis of a parameter."""
        self._place(op, labels, "consumes", times)

    def passes(self, op: Op, labels: Field) -> None:
        """Record that an operator treats channels by themselves, with an axis of a parameter."""
        self._place(op, labels, "passes")

    def merged(self, op: Op, given: Sequence[tuple[Value, Iterable[Field]]], *, but: int | None = None) -> list[Field]:
        """Couple the fields of tensors that are combined element by element, and return those of the result.

        Args:
            op: The operator.
            given: The tensors, whose shapes are broadcast, each with its fields.
            but: An axis along which they are not combined.
        """
        rank = max((len(value.shape) for value, _ in given), default=0)
        shapes = [(1,) * (rank - len(value.shape)) + value.shape for value, _ in given]
        listed = [[field.reshape((1,) * (rank - field.ndim) + field.shape) for field in fields] for _, fields in given]
        self._keep_shared(given, listed)
        result: list[Field] = []
        for at, fields in enumerate(listed):
            for field in fields:
                axes = [axis for axis in axes_of(field) if axis != but]
                bare = self._met_by_what_stays(axes, shapes, listed, at)
                field = self.collapse(op, field, bare, "joins channels with something that has none")
                axes = [axis for axis in axes_of(field) if axis != but]
                if not field.any():
                    continue
                known = next((i for i, other in enumerate(result) if set(axes_of(other)) & set(axes)), None)
                if known is None:
                    result.append(field)
                    continue
                self.labels.couple(result[known], field)
                if len(axes_of(field)) > len(axes_of(result[known])):
                    result[known] = field
        return result

    def _keep_shared(self, given: Sequence[tuple[Value, Iterable[Field]]], listed: list[list[Field]]) -> None:
        """Keep the elements of a constant that several channels share, such as a rotary embedding that all heads have.

        Otherwise the channels would be coupled by it: all heads, element by element.
        """
        several = [
            set(axes_of(field))
            for (value, _), fields in zip(given, listed, strict=True)
            for field in fields
            if not value.constant and len(axes_of(field)) > 1
        ]
        for (value, _), fields in zip(given, listed, strict=True):
            for field in list(fields) if value.constant else ():
                if any(set(axes_of(field)) < axes for axes in several):
                    self.labels.keep(field)
                    fields[:] = [other for other in fields if other is not field]

    @staticmethod
    def _met_by_what_stays(
        axes: Sequence[int], shapes: Sequence[Sequence[int]], listed: Sequence[Sequence[Field]], at: int
    ) -> list[int]:
        """The axes along which another tensor has elements that belong to no channel."""
        return [
            axis
            for axis in axes
            if any(
                other != at and shape[axis] > 1 and not any(field.shape[axis] > 1 for field in fields)
                for other, (shape, fields) in enumerate(zip(shapes, listed, strict=True))
            )
        ]

    def _axes_of_tensor(self, name: str, value: Value) -> Iterable[Field]:
        """Hand out labels for the elements of every axis of a parameter."""
        for axis, size in enumerate(value.shape):
            if size > 1:
                self._axis_of_label += [(name, axis)] * size
                yield along(self.labels.fresh(size), axis, len(value.shape))

    def _place(self, op: Op, labels: Field, role: str, times: int = 1) -> None:
        """Record places of every parameter to whose axes the labels belong."""
        for name, dim in sorted(self.tensor_of(labels)):
            own = next(field for field in self._fields[self.trace.tensors[name]] if field.shape[dim] > 1)
            self.places.append(Place(name, dim, own.reshape(-1), role, op, times))

    def _run(self, norms: Mapping[Call, NormFound]) -> None:
        starts = {call.start: call for call in norms if call.end > call.start}
        skipped_until = 0
        for op in self.trace.ops:
            if op.index < skipped_until:
                continue
            call = starts.get(op.index)
            if call is not None and self._normalise(call, op, *norms[call]):
                skipped_until = call.end
                continue
            made = self.table[op.name](op, self) if op.name in self.table else self.stop(op)
            if len(made) == 1 and len(op.outputs) > 1:
                made = [*made, *([()] * (len(op.outputs) - 1))]
            for value, fields in zip(op.outputs, made, strict=True):
                self._fields[value] = fields

    def _normalise(self, call: Call, op: Op, kind: str, eps: float, dim: int, parts: int) -> bool:
        """Handle the call of a norm as one operator; return whether it runs over channels at all."""
        given, made = call.inputs[0], call.output
        assert made is not None
        along_axis = [field for field in self.fields(given) if axes_of(field) == [dim]]
        others = [field for field in self.fields(given) if axes_of(field) != [dim]]
        if not along_axis or any(field.shape[dim] > 1 for field in others) or (kind == "group" and others):
            return False
        called = sum(other.path == call.path for other in self.trace.calls)
        if called > 1 and not any(name.startswith(f"{call.path}.") for name in self.trace.tensors):
            return False  # nothing says which channels of its calls are the same
        labels = along_axis[0].reshape(-1)
        if parts > 1:
            table = labels.reshape(parts, -1)
            self.labels.couple(table, table[:1])
        for name in ("weight", "bias"):
            own = self.trace.tensors.get(f"{call.path}.{name}")
            for field in () if own is None else self.fields(own):
                self.labels.couple(field.reshape(-1), labels)
                self.passes(op, field.reshape(-1))
        self.norms.append(NormPlace(call, kind, eps, dim, parts, labels))
        self._fields[made] = compress([*along_axis, *others])
        return True

    def _add_other_places(self) -> None:
        """Parameters that only flow along, such as a class token that is joined to the patches, pass channels too."""
        known = {(place.tensor, place.dim) for place in self.places}
        for name, value in self.trace.tensors.items():
            for field in self._fields[value] if value.users else ():
                if (name, axes_of(field)[0]) not in known:
                    self._place(value.users[0], field.reshape(-1), "passes")

    def _join_slices(self) -> None:
        """Slices of one length that make up an axis come from code that divides it: each keeps the same."""
        for (value, axis), parts in self._slices.items():
            whole = sum(len(part) for part in parts) == value.shape[axis]
            if len({len(part) for part in parts}) == 1 and whole:
                for part in parts[1:]:
                    self.labels.couple(part, parts[0])
