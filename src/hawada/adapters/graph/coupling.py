"""Coupling: elements of parameters that belong to one channel; each channel has a number that is followed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from hawada.adapters.graph.axes import AXIS_RULES, Axis, Labels, argument, flatten, takes_size, value
from hawada.adapters.graph.operators import (
    CONVOLUTION_MODULES,
    PRODUCT_FUNCTIONS,
    SUM_FUNCTIONS,
    ZERO_CHANGING_FUNCTIONS,
    ZERO_CHANGING_MODULES,
    ZERO_KEEPING_FUNCTIONS,
    ZERO_KEEPING_MODULES,
    is_channel_norm,
    is_type,
    operator_name,
)
from hawada.adapters.graph.trace import Trace

KEPT_LABEL = 0  # everything that must stay has this label


@dataclass(frozen=True)
class Place:
    """An axis of a parameter or buffer whose elements belong to channels.

    Attributes:
        tensor: The name of the parameter or buffer.
        dim: The index of the axis.
        labels: For each element, the number of its channel.
        role: The module `produces` new channels, `consumes` (and mixes) them, or `passes` each on by itself.
        follows: The attribute of the module that must equal the size, as in `Cut`.
        times: The number of times that the axis repeats the units, as in `Cut`.
        node: The node of the module's call.
        input: The axis of the activation that a consumer is called with.
    """

    tensor: str
    dim: int
    labels: Labels
    role: str
    follows: str | None
    times: int
    node: fx.Node
    input: Axis | None = None


class Coupling:
    """The channels of one trace: a walk over its nodes numbers them and records which are the same.

    An operator that is not understood keeps all its channels: its inputs are coupled to `KEPT_LABEL`, and its output
    has none. A model in which those stay computes the same as before, whatever the operator is.

    Attributes:
        axes: For each node, the axis that holds its channels; None where all stay or there are none.
        places: The axes of parameters that hold channels, in order of execution.
        sums: The labels that an addition joined, which make a residual stream.
        shifts: The nodes that turn 0 into something else, with the labels that pass them.
        obstacles: The nodes that keep all their channels, with the reason.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.axes: dict[fx.Node, Axis | None] = {}
        self.places: list[Place] = []
        self.sums: list[Labels] = []
        self.shifts: list[tuple[fx.Node, Labels]] = []
        self.obstacles: list[tuple[fx.Node, str]] = []
        self._pairs: list[tuple[Labels, Labels]] = []
        self._produced: dict[str, Labels] = {}
        self._labels_of_axis: dict[tuple[str, int], Labels] = {}
        self._count = 1
        self._names = {id(t): n for n, t in [*trace.model.named_parameters(), *trace.model.named_buffers()]}
        self._kept: list[tuple[str, int | None]] = []  # tensors of which one axis, or (None) every axis, must stay
        for node in trace.nodes:
            self.axes[node] = self._visit(node)
        for place in self.places:
            if (place.tensor, place.dim) in self._kept or (place.tensor, None) in self._kept:
                self.couple(place.labels, np.asarray(KEPT_LABEL))

    def couple(self, first: Labels, second: Labels) -> None:
        """Record that channels are the same, position by position."""
        one, other = np.broadcast_arrays(first, second)
        self._pairs.append((one.ravel(), other.ravel()))

    def resolve(self) -> Labels:
        """Return for every label the smallest label of the same channel; 0 stands for all that must stay."""
        empty = np.zeros(0, np.int64)
        first, second = (np.concatenate([empty, *(pair[side] for pair in self._pairs)]) for side in (0, 1))
        graph = coo_array((np.ones(len(first)), (first, second)), shape=(self._count, self._count))
        component = connected_components(graph, directed=False)[1]
        smallest = np.full(component.max() + 1, self._count)
        np.minimum.at(smallest, component, np.arange(self._count))
        labels: Labels = smallest[component]
        return labels

    def _visit(self, node: fx.Node) -> Axis | None:
        if node.op == "call_module":
            return self._module(node, self.trace.model.get_submodule(str(node.target)))
        if node.op in ("call_function", "call_method"):
            return self._operator(node, operator_name(node))
        if node.op == "output":
            self._keep(node.all_input_nodes)
        if node.op == "get_attr":  # the code uses a parameter directly
            self._kept.append((self._name(str(node.target)), None))
        return None

    def _module(self, node: fx.Node, module: nn.Module) -> Axis | None:
        given = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(given, fx.Node):
            return self._stop(node, "is called with more than one tensor")
        axis, path = self.axes[given], str(node.target)
        if is_type(module, (nn.Linear, *CONVOLUTION_MODULES)) and "weight" not in module._parameters:
            self._keep_parameters_of(module, path)
            return self._stop(node, "computes its weight from other parameters")
        if is_type(module, (nn.Linear,)):
            return self._linear(node, path, module, given, axis)
        if is_type(module, CONVOLUTION_MODULES):
            return self._convolution(node, path, module, given, axis)
        if axis is None:
            self._keep_parameters_of(module, path)
            return None
        if is_channel_norm(module) and axis.dim == 1:
            tensors = [name for name in ("weight", "bias", "running_mean", "running_var") if _has(module, name)]
            for name in tensors:
                follows = "num_features" if name == tensors[-1] else None
                self._place(f"{path}.{name}", 0, axis.labels, "passes", node, follows)
            self.shifts.append((node, axis.labels))
            return axis
        if isinstance(module, nn.Flatten):
            shape = value(given).shape
            return self._axis_or_stop(node, flatten(axis, shape, int(module.start_dim), int(module.end_dim)))
        if isinstance(module, StochasticDepth) or is_type(module, ZERO_KEEPING_MODULES):
            return axis
        if is_type(module, ZERO_CHANGING_MODULES):
            self.shifts.append((node, axis.labels))
            return axis
        self._keep_parameters_of(module, path)
        return self._stop(node, f"{type(module).__name__} is not understood")

    def _linear(self, node: fx.Node, path: str, module: Any, given: fx.Node, axis: Axis | None) -> Axis:
        last = value(given).dim() - 1
        if axis is not None and axis.dim != last:
            self._keep([given])
        if axis is not None and axis.dim == last:
            self._place(f"{path}.weight", 1, axis.labels, "consumes", node, "in_features", axis=axis)
        else:
            self._kept.append((self._name(f"{path}.weight"), 1))
        return self._produce(node, path, module, last, "out_features")

    def _convolution(self, node: fx.Node, path: str, module: Any, given: fx.Node, axis: Axis | None) -> Axis | None:
        groups, unbatched = module.groups, value(given).dim() != module.weight.dim()
        inner, outer = module.weight.shape[1], module.weight.shape[0]
        if unbatched or (axis is not None and axis.dim != 1):
            self._keep_parameters_of(module, path)
            return self._stop(node, "takes channels from another axis than the second")
        if groups > 1 and inner == 1:
            if outer != groups:
                self._keep_parameters_of(module, path)
                return self._stop(node, "is depthwise with several filters for each channel")
            if axis is None:
                self._keep_parameters_of(module, path)
                return None
            for follows in ("out_channels", "in_channels", "groups"):
                self._place(f"{path}.weight", 0, axis.labels, "passes", node, follows)
            if module.bias is not None:
                self._place(f"{path}.bias", 0, axis.labels, "passes", node, None)
                self.shifts.append((node, axis.labels))
            return axis
        if axis is not None:
            table = axis.labels.reshape(groups, inner)  # one row per group of the convolution: a unit is one column
            self.couple(table, table[:1])
            self._place(f"{path}.weight", 1, table[0], "consumes", node, "in_channels", times=groups, axis=axis)
        else:
            self._kept.append((self._name(f"{path}.weight"), 1))
        produced = self._produce(node, path, module, 1, "out_channels")
        table = produced.labels.reshape(groups, outer // groups)
        self.couple(table, table[:1])
        return produced

    def _produce(self, node: fx.Node, path: str, module: Any, dim: int, follows: str) -> Axis:
        """Number new channels; a module that is called again produces the same ones."""
        name = self._name(f"{path}.weight")
        if name not in self._produced:
            self._produced[name] = np.arange(module.weight.shape[0]) + self._count
            self._count += module.weight.shape[0]
        labels = self._produced[name]
        self._place(f"{path}.weight", 0, labels, "produces", node, follows)
        if module.bias is not None:
            self._place(f"{path}.bias", 0, labels, "produces", node, None)
        return Axis(dim, labels)

    def _operator(self, node: fx.Node, name: str) -> Axis | None:
        tensors = [other for other in node.all_input_nodes if self.axes.get(other) is not None]
        if name in ("cat", "concat") and tensors:
            return self._concatenation(node)
        if name in SUM_FUNCTIONS | PRODUCT_FUNCTIONS:
            return self._pointwise(node, name)
        if not tensors:
            return None
        axis = self.axes[tensors[0]]
        if axis is None or len(tensors) > 1 or node.args[:1] != (tensors[0],):
            return self._stop(node, "is not understood")
        if name in ZERO_CHANGING_FUNCTIONS:
            self.shifts.append((node, axis.labels))
        if name in ZERO_KEEPING_FUNCTIONS | ZERO_CHANGING_FUNCTIONS:
            return axis
        if name in AXIS_RULES:
            return self._axis_or_stop(node, AXIS_RULES[name](node, axis))
        if name in ("size", "getattr", "dim") and not isinstance(value(node), Tensor):
            if takes_size(node, axis):
                self._stop(node, "takes the number of channels, which may be written into code")
            return None
        return self._stop(node, "is not understood")

    def _axis_or_stop(self, node: fx.Node, axis: Axis | str) -> Axis | None:
        return self._stop(node, axis) if isinstance(axis, str) else axis

    def _pointwise(self, node: fx.Node, name: str) -> Axis | None:
        """Follow sums and products of two tensors, broadcast, or of a tensor and a number."""
        operands = [arg for arg in node.args[:2] if isinstance(arg, fx.Node) and isinstance(value(arg), Tensor)]
        tracked = [operand for operand in operands if self.axes[operand] is not None]
        if not tracked:
            return None
        if not isinstance(value(node), Tensor) or (
            name in PRODUCT_FUNCTIONS - {"mul"} and tracked[0] is not node.args[0]
        ):
            return self._stop(node, "divides by channels")
        rank = value(node).dim()
        lead = max(tracked, key=lambda operand: value(operand).numel())
        axis = self.axes[lead]
        assert axis is not None
        dim = axis.dim + rank - value(lead).dim()
        for operand in operands:
            own, back = self.axes[operand], rank - value(operand).dim()
            if operand is lead:
                continue
            size = value(operand).shape[dim - back] if dim >= back else 1
            if own is not None and own.dim + back == dim and size == len(axis.labels):
                self.couple(axis.labels, own.labels)
            elif own is not None or size != 1:  # the operand has other channels, or elements that cannot go
                return self._stop(node, "joins channels with something that has none or has them elsewhere")
        if name in SUM_FUNCTIONS and len(tracked) == 2:
            self.sums.append(axis.labels)
        elif name in SUM_FUNCTIONS:
            self.shifts.append((node, axis.labels))
        return Axis(dim, axis.labels)

    def _concatenation(self, node: fx.Node) -> Axis | None:
        parts: Any = node.args[0]
        dim = argument(node, 1, "dim", 0)
        rank = value(node).dim()
        if not isinstance(parts, list | tuple) or not all(isinstance(part, fx.Node) for part in parts):
            return self._stop(node, "joins a list that is not written out")
        axes = [self.axes[part] for part in parts]
        if any(axis is not None and axis.dim != dim % rank for axis in axes):
            return self._stop(node, "joins tensors on another axis than that of their channels")
        whole = [np.full(value(part).shape[dim], KEPT_LABEL) for part in parts]
        labels = [own if axis is None else axis.labels for axis, own in zip(axes, whole, strict=True)]
        return Axis(dim % rank, np.concatenate(labels))

    def _stop(self, node: fx.Node, reason: str) -> Axis | None:
        """Keep all channels of a node's inputs; its output has none."""
        kept = [other for other in node.all_input_nodes if self.axes.get(other) is not None]
        if kept:
            self.obstacles.append((node, reason))
            self._keep(kept)
        return None

    def _keep(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            axis = self.axes.get(node)
            if axis is not None:
                self.couple(axis.labels, np.asarray(KEPT_LABEL))

    def _keep_parameters_of(self, module: nn.Module, path: str) -> None:
        """Keep the parameters of a module that is not understood; another module or call may share them."""
        self._kept += [(self._name(name), None) for name, _ in module.named_parameters(prefix=path)]

    def _place(
        self,
        tensor: str,
        dim: int,
        labels: Labels,
        role: str,
        node: fx.Node,
        follows: str | None,
        times: int = 1,
        axis: Axis | None = None,
    ) -> None:
        if tensor != self._name(tensor):  # it is tied to another module's tensor, whose attributes would follow instead
            self._kept.append((self._name(tensor), None))
        tensor = self._name(tensor)
        known = self._labels_of_axis.setdefault((tensor, dim), labels)
        if known is not labels:  # the tensor was used before
            self.couple(known, labels)
        self.places.append(Place(tensor, dim, known, role, follows, times, node, axis))

    def _name(self, tensor: str) -> str:
        """Return the name of a tensor; of a tied tensor, the first of its names."""
        path, _, name = tensor.rpartition(".")
        return self._names[id(getattr(self.trace.model.get_submodule(path), name))]


def describe(obstacles: Sequence[tuple[fx.Node, str]]) -> str:
    """Describe the first obstacle by the name of its node and the operator that it calls."""
    node, reason = obstacles[0]
    called = str(node.target) if node.op == "call_module" else f"{node.name} ({operator_name(node) or node.target})"
    return f"{called} {reason}"


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), Tensor)
