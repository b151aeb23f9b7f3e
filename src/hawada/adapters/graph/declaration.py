"""The declaration of a traced model: groups made from its coupled channels and residual blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from os.path import commonpath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawada.adapters.graph.labels import STAYS, Field, axes_of
from hawada.adapters.graph.norms import find_norms
from hawada.adapters.graph.residual import Residual, find_residuals
from hawada.adapters.graph.rules import RULES
from hawada.adapters.graph.rules.views import VIEWS
from hawada.adapters.graph.trace import Call, Op, Trace, Value
from hawada.adapters.graph.walk import OUTPUT, NormFound, Place, Walk
from hawada.core.structure import Cut, GatePoint, Group, Norm, Removal, Size

MAX_GROUPS_PER_SITE = 4  # the latency table of a site has one axis for each group that touches it
# The attributes of modules that tell the size of an axis of their parameters, by the role of the axis.
FOLLOWING = {
    "produces": ("out_channels", "out_features", "embedding_dim"),
    "consumes": ("in_channels", "in_features"),
    "passes": ("num_features", "num_channels", "normalized_shape", "num_parameters"),
}
FOLLOWING_DEPTHWISE = ("out_channels", "in_channels", "groups")


Following = tuple[str, Field]  # the path of an attribute and the labels of the axis that it tells the size of


@dataclass(frozen=True)
class Layout:
    """Where units lie on an axis, as in `Cut`."""

    per_unit: int
    offsets: tuple[int, ...]
    positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Remedies:
    """What a trial found to be necessary.

    Attributes:
        kept: Channels that must stay, with the operator and the reason.
        tied: Channels that are the same, position by position.
        following: Attributes of modules that follow an axis, with its labels.
    """

    kept: tuple[tuple[Op, Field, str], ...] = ()
    tied: tuple[tuple[Field, Field], ...] = ()
    following: tuple[Following, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """Channels that have the same producers: the units of one group.

    Attributes:
        name: The name of the group.
        kind: The kind of the group.
        units: The number of each channel, see `Declaration.channels`.
        places: The axes of tensors that hold the channels.
        order: The index of the first operator that handles the channels.
    """

    name: str
    kind: str
    units: Field
    places: tuple[Place, ...]
    order: int


class Declaration:
    """The groups that can be removed from a traced model.

    Attributes:
        walk: What was found on the way through the operators.
        channels: For every label the number of its channel; 0 stands for all that must stay.
        residuals: The blocks whose branch can go.
        groups: The branches with the groups inside them, in order of execution, then the streams.
        units: For each group, the channels that are its units.
        of_streams: The channels that residual blocks are called with or add into, and those that more than two layers
            add into.
        holder: For each channel, the index of its group; -1 where it has none.

    Args:
        trace: The forward pass.
        stream: Whether residual streams may become narrower.
        remedies: What a trial found to be necessary.
        norms: The norms over channels, as `find_norms` returns them; None finds them.

    Raises:
        ValueError: Nothing can be removed; the message names the first operator that keeps its channels.
    """

    def __init__(
        self,
        trace: Trace,
        *,
        stream: bool,
        remedies: Remedies = Remedies(),
        norms: Mapping[Call, NormFound] | None = None,
    ) -> None:
        self.trace, self.stream, self.remedies = trace, stream, remedies
        self._parameters = {name for name, _ in trace.model.named_parameters()}
        self.walk = Walk(trace, RULES, find_norms(trace) if norms is None else norms)
        for op, labels, reason in remedies.kept:
            self.walk.keep_field(op, labels, reason)
        for labels, others in remedies.tied:
            self.walk.labels.couple(labels, others)
        self.residuals = find_residuals(trace)
        self._join_uneven()
        self._join_concatenated()
        self.channels = self.walk.labels.resolve()
        self.of_streams = self._find_streams()
        found = [self._group(bundle) for bundle in self._bundles(stream)]
        plain = [entry for entry in found if entry is not None]
        branches = [(self._branch(block), np.zeros(0, np.int64), block.call.start - 0.5) for block in self.residuals]
        streams = [entry for entry in plain if entry[0].kind == "stream"]
        inner = [entry for entry in plain if entry[0].kind != "stream"]
        ordered = [*sorted([*branches, *inner], key=lambda entry: entry[2]), *sorted(streams, key=lambda e: e[2])]
        self.groups = [group for group, _, _ in ordered]
        self.units = [units for _, units, _ in ordered]
        self.holder = np.full(len(self.channels), -1)  # for each channel, the index of its group
        for index, units in enumerate(self.units):
            self.holder[units] = index

    def check(self) -> None:
        """Refuse a model of which nothing can be removed."""
        if not self.groups:
            name, remedy = type(self.trace.model).__name__, "declare its groups with an adapter of your own"
            if not self.stream and self._bundles(stream=True):
                remedy = "set model.adapter.stream=true"
            reason = self._first_obstacle() or "all channels that it has are those of its inputs, outputs and streams"
            raise ValueError(f"{name}: nothing can be pruned: {reason}; {remedy}")

    def groups_on(self, field: Field) -> dict[str, int]:
        """Return the groups that have channels on a field, each with the number of elements that a unit has there."""
        labels = self.channels[field.reshape(-1)]
        index, counts = np.unique(self.holder[labels], return_counts=True)
        groups = [(self.groups[i], count) for i, count in zip(index, counts, strict=True) if i >= 0]
        return {group.name: int(count) // group.units for group, count in groups}

    def is_stream(self, labels: Field) -> bool:
        """Return whether channels are those of a stream."""
        return bool(self._channels_of([labels]) & self.of_streams)

    def _first_obstacle(self) -> str:
        for op, labels, reason in self.walk.obstacles:
            if reason != OUTPUT and any(
                place.role == "produces" and np.isin(place.labels, labels).any() for place in self.walk.places
            ):
                return f"{op.place} {reason}"
        return ""

    def _join_uneven(self) -> None:
        """Where channels differ along two axes at once, as in groups of channels, each group keeps the same ones."""
        uneven = [field for value in self.trace.ops for made in value.outputs for field in self.walk.fields(made)]
        uneven = [field for field in uneven if len(axes_of(field)) > 1]
        again = bool(uneven)
        while again:
            again, channels = False, self.walk.labels.resolve()
            for field in uneven:
                seen = channels[field]
                varying = [axis for axis in axes_of(seen) if (seen != seen.take([0], axis)).any()]
                for axis in varying[:-1]:
                    self.walk.labels.couple(field, field.take([0], axis))
                    again = True
                if varying[:-1]:
                    break

    def _join_concatenated(self) -> None:
        """Couple groups of one size, index by index, where one layer consumes very many groups (in a dense block).

        A latency table has an axis for each group that touches a site, so their number must stay small.
        """
        places = self.walk.places
        joined = True
        while joined:
            joined, channels = False, self.walk.labels.resolve()
            produced = [np.unique(channels[place.labels]) for place in places if place.role == "produces"]
            produced = [units[units != STAYS] for units in produced]
            producer = np.full(len(channels), -1)  # for each channel, the first place that produces it
            for index, units in reversed(list(enumerate(produced))):
                producer[units] = index
            for place in places:
                if place.role != "consumes":
                    continue
                present = np.unique(producer[channels[place.labels]])
                present = present[present >= 0]
                if len(present) <= MAX_GROUPS_PER_SITE:
                    continue
                first: dict[int, int] = {}
                for index in present:
                    alike = first.setdefault(len(produced[index]), index)
                    if alike != index and not np.array_equal(produced[alike], produced[index]):
                        self.walk.labels.couple(produced[alike], produced[index])
                        joined = True

    def _bundles(self, stream: bool) -> list[Bundle]:
        """Sort channels by the layers that produce them and the places that hold them."""
        places = self.walk.places
        producers: dict[int, dict[str, None]] = {}
        holders: dict[int, dict[int, None]] = {}
        for number, place in enumerate(places):
            for channel in np.unique(self.channels[place.labels]):
                holders.setdefault(int(channel), {})[number] = None
                if place.role == "produces":
                    producers.setdefault(int(channel), {})[place.tensor.rpartition(".")[0] or place.tensor] = None
        producers.pop(STAYS, None)
        families: dict[tuple[tuple[str, ...], tuple[int, ...]], list[int]] = {}
        for channel in sorted(producers):
            families.setdefault((tuple(producers[channel]), tuple(holders[channel])), []).append(channel)
        bundles = []
        for (paths, numbers), listed in families.items():
            own = tuple(places[number] for number in numbers)
            # Channels that enter a block with a projection, and into which nothing is added, are a stream of the stem.
            in_stream = bool(self.of_streams.intersection(listed))
            if in_stream and not stream:
                continue
            kind = "stream" if in_stream else self._kind_of_units(own)
            name = f"{self._stage(own) or paths[0]}.stream" if in_stream else paths[0]
            order = min(place.op.index for place in own)
            bundles.append(Bundle(name, kind, np.asarray(listed, np.int64), own, order))
        return _unique(bundles)

    def _find_streams(self) -> set[int]:
        makers: dict[int, set[str]] = {}
        for place in self.walk.places:
            if place.role == "produces":
                for channel in np.unique(self.channels[place.labels]):
                    makers.setdefault(int(channel), set()).add(place.tensor.rpartition(".")[0] or place.tensor)
        found = self._channels_of(self._entering())
        for op, labels in self.walk.sums:
            added = self._channels_of([labels])
            in_block = any(op in block.call for block in self.residuals)
            found |= added if in_block else {channel for channel in added if len(makers.get(channel, ())) > 2}
        return found - {STAYS}

    def _channels_of(self, listed: Iterable[Field]) -> set[int]:
        return {int(channel) for labels in listed for channel in np.unique(self.channels[labels])}

    def _kind_of_units(self, places: Sequence[Place]) -> str:
        """Name the kind of a group.

        Units of a convolution with groups are few and large, so they are not rounded as other channels are.
        """
        produced = [self.channels[place.labels] for place in places if place.role == "produces"]
        several = any(len(set(w[w > 0])) < (w > 0).sum() for w in produced)
        if not any(place.op.name == "convolution" for place in places):
            return "head" if several else "ffn"
        return "grouped" if several or any(place.times > 1 for place in places) else "channel"

    def _entering(self) -> list[Field]:
        """List the labels of the channels that residual blocks are called with."""
        return [field.reshape(-1) for block in self.residuals for field in self.walk.fields(block.call.inputs[0])]

    def _stage(self, places: Sequence[Place]) -> str:
        """Return the path that all residual blocks which produce a stream have in common."""
        producing = [place.tensor.rpartition(".")[0] for place in places if place.role == "produces"]
        blocks = {block.path for block in self.residuals for path in producing if path.startswith(f"{block.path}.")}
        parents = [path.rpartition(".")[0].replace(".", "/") for path in blocks]
        return commonpath(parents).replace("/", ".") if parents else ""

    def _branch(self, block: Residual) -> Group:
        return Group(
            name=f"{block.path}.branch",
            kind="branch",
            units=1,
            gated_at=tuple(GatePoint(gate) for gate in block.gates),
            removes=(Removal(block.path, block.keeps),),
            parent=self._parent([block.path]),
        )

    def _parent(self, modules: Sequence[str]) -> str | None:
        """Name the innermost branch that holds all these modules."""
        holding = [block.path for block in self.residuals if all(block.holds(module) for module in modules)]
        return f"{max(holding, key=len)}.branch" if holding else None

    def _group(self, bundle: Bundle) -> tuple[Group, Field, float] | None:
        """Make the group of a bundle, with its channels and its rank in order; None where no pattern describes it."""
        cuts: dict[Cut, None] = {}
        for place in sorted(bundle.places, key=lambda place: place.role == "consumes"):
            layout = _layout(self.channels[place.labels], bundle.units)
            if layout is None:
                self.walk.obstacles.append((place.op, bundle.units, "holds some channels more often than others"))
                return None
            where = Cut(place.tensor, place.dim, layout.per_unit, layout.offsets, positions=layout.positions)
            cuts |= dict.fromkeys(replace(where, **follows) for follows in self._following(place))
        points, norms = self._points(bundle), self._norms(bundle)
        if not points or norms is None:
            reason = "is consumed by no parameter" if not points else "is normalised in an order that has no pattern"
            self.walk.obstacles.append((bundle.places[0].op, bundle.units, reason))
            return None
        modules = [cut.module for cut in cuts] + [point.module for point in points]
        group = Group(
            name=bundle.name,
            kind=bundle.kind,
            units=len(bundle.units),
            gated_at=tuple(points),
            cuts=tuple(cuts),
            parent=self._parent(modules),
            norms=norms,
            sizes=self._sizes(bundle),
        )
        return group, bundle.units, bundle.order

    def _sizes(self, bundle: Bundle) -> tuple[Size, ...]:
        """The attributes that become smaller with the units."""
        found = {}
        for attribute, labels in self.remedies.following:
            here = int(np.isin(self.channels[labels], bundle.units).sum())
            if here:
                found[attribute] = Size(attribute, here // len(bundle.units))
        return tuple(found.values())

    def _following(self, place: Place) -> list[dict[str, Any]]:
        """The attributes that tell the size of an axis, as arguments of `Cut`; one without any where there is none."""
        module, _, name = place.tensor.rpartition(".")
        owner, size = self.trace.model.get_submodule(module), len(place.labels)
        telling = "weight" if getattr(owner, "weight", None) is not None else "running_mean"
        names = FOLLOWING[place.role] if name == telling else ()
        if place.role == "passes" and place.op.name == "convolution" and name == "weight":
            names = FOLLOWING_DEPTHWISE
        found: list[dict[str, Any]] = []
        for attribute in names:
            value = getattr(owner, attribute, None)
            if value == size * place.times or value == (size,):
                found.append({"follows": attribute, "times": place.times})
            elif attribute in ("in_channels", "groups") and isinstance(value, int) and value and size % value == 0:
                found.append({"follows": attribute, "divided_by": size // value})
        return found or [{}]

    def _points(self, bundle: Bundle) -> list[GatePoint | Cut] | None:
        """Gate what consumes the units: removed channels reach it as zeros, whatever came before.

        That is the input of the module, where its only use is the consumption, and else the columns of its weight.
        """
        points: dict[GatePoint | Cut, None] = {}
        for place in bundle.places:
            if place.role != "consumes":
                continue
            point: GatePoint | Cut | None = self._at_input(place, bundle)
            if point is None:
                layout = _layout(self.channels[place.labels], bundle.units)
                parameter = self.trace.tensors[place.tensor]
                scaled = any(_leads_to(value, parameter, SCALING) for value in place.op.inputs if value.constant)
                if layout is None or place.tensor not in self._parameters or not scaled:
                    return None
                point = Cut(place.tensor, place.dim, layout.per_unit, layout.offsets, positions=layout.positions)
            points[point] = None
        return list(points)

    def _at_input(self, place: Place, bundle: Bundle) -> GatePoint | None:
        path = place.tensor.rpartition(".")[0]
        call = next((call for call in reversed(place.op.calls) if call.path == path), None)
        if call is None or not call.leaf or call.first is None or call.output is None:
            return None
        if any(np.isin(self.channels[field], bundle.units).any() for field in self.walk.fields(call.output)):
            return None
        own = [op for op in self.trace.ops[call.start : call.end] if op.name in CONSUMING]
        ranks = {len(other.first.shape) for other in self.trace.calls if other.path == path and other.first is not None}
        if own != [place.op] or len(ranks) > 1:
            return None
        if not any(_leads_to(value, call.first, MOVING) for value in place.op.inputs if not value.constant):
            return None
        for field in self.walk.fields(call.first):
            axes = axes_of(field)
            if len(axes) == 1:
                layout = _layout(self.channels[field.reshape(-1)], bundle.units)
                if layout is not None:
                    return GatePoint(path, "input", axes[0], **_within(layout, bundle, field))
        return None

    def _norms(self, bundle: Bundle) -> tuple[Norm, ...] | None:
        """The norms over the units; None where they lie in an order that has no pattern."""
        found: dict[Norm, None] = {}
        for norm in self.walk.norms:
            labels = self.channels[norm.labels]
            if not np.isin(labels, bundle.units).any():
                continue
            layout = _layout(labels, bundle.units)
            if layout is None:
                return None
            where = _within(layout, bundle, norm.labels)
            found[Norm(norm.call.path, norm.kind, norm.eps, norm.dim, norm.parts, multiplied=False, **where)] = None
        return tuple(found)


MOVING = {*VIEWS.table, "clone", "_to_copy", "alias", "detach"} - {"constant_pad_nd", "pad", "copy"}
SCALING = {*MOVING, "mul", "div"}
CONSUMING = {"convolution", "mm", "addmm", "bmm", "baddbmm"}


def _leads_to(value: Value, target: Value, through: Set[str]) -> bool:
    """Whether a value is made of another by these operators alone."""
    if value is target:
        return True
    op = value.op
    if op is None or op.name not in through or (op.name == "div" and op.args[0] is not op.inputs[0]):
        return False
    return any(_leads_to(given, target, through) for given in (op.inputs[:1] if op.name == "div" else op.inputs))


def _within(layout: Layout, bundle: Bundle, field: Field) -> dict[str, Any]:
    """A layout as gate points and norms have it: None for the offsets where the units fill the axis in order."""
    fills = layout.offsets == (0,) and not layout.positions and layout.per_unit * len(bundle.units) == field.size
    return asdict(layout) | {"offsets": None if fills or layout.positions else layout.offsets}


def _unique(bundles: list[Bundle]) -> list[Bundle]:
    """Make names unique: streams are named by their first producer, parts of one producer are numbered."""
    names = [bundle.name for bundle in bundles]
    renamed = []
    for bundle in bundles:
        if names.count(bundle.name) > 1 and bundle.kind == "stream":
            first = next(place.tensor for place in bundle.places if place.role == "produces")
            bundle = replace(bundle, name=f"{first.removesuffix('.weight')}.stream")
        renamed.append(bundle)
    names = [bundle.name for bundle in renamed]
    return [
        replace(bundle, name=f"{bundle.name}.{names[:index].count(bundle.name)}")
        if names.count(bundle.name) > 1
        else bundle
        for index, bundle in enumerate(renamed)
    ]


def _layout(channels: Field, units: Field) -> Layout | None:
    """Describe where units lie on an axis, as `Cut` does; None where not all have equally many elements there."""
    where = np.flatnonzero(np.isin(channels, units))
    if not len(where) or len(where) % len(units):
        return None
    rank = np.searchsorted(units, channels[where])
    order = np.lexsort((where, rank))
    table: NDArray[np.int64] = where[order].reshape(len(units), -1)  # one row per unit
    if (rank[order].reshape(table.shape) != np.arange(len(units))[:, None]).any():
        return None
    each = table.shape[1]
    in_a_row = int(table[0, -1] - table[0, 0]) == each - 1
    step = int(table[1, 0] - table[0, 0]) if len(units) > 1 else (each if in_a_row else 1)
    if step >= 1 and each % step == 0:
        offsets = table[0, ::step]
        expected = (offsets[:, None] + np.arange(step)).reshape(1, -1) + np.arange(len(units))[:, None] * step
        if (table == expected).all():
            return Layout(step, tuple(int(offset) for offset in offsets))
    return Layout(each, (0,), tuple(int(position) for position in table.reshape(-1)))
