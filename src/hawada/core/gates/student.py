"""`Student`: a model and its gates as one module, joined by hooks; without them the model is what it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hawada.core.gates.gates import SigmoidGate, multiply_along
from hawada.core.structure import Cut, GatePoint, Group, ModelHook, Norm, check_groups, without_orphans

GateFactory = Callable[[int], SigmoidGate]
"""A function that makes a gate for a number of units."""


class GateHook(ModelHook):
    """Multiplies a module's first input, or its first output, by a gate."""

    def __init__(self, gate: SigmoidGate, point: GatePoint) -> None:
        self.gate = gate
        self.point = point

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> Any:
        x, *rest = args if self.point.side == "input" else (output if isinstance(output, tuple) else (output,))
        x = multiply_along(
            x, self.gate.factor, self.point.dim, self.point.per_unit, self.point.offsets, self.point.positions
        )
        if self.point.side == "input" or isinstance(output, tuple):
            return (x, *rest)
        return x


class NormHook(ModelHook):
    """Computes a norm again with statistics over the kept units: a gate of 0 takes a unit out of mean and variance.

    If all gates are equal, the result is the norm's output times that gate. The output of a unit whose gate is 0 is
    exactly 0, but for its bias where no gate multiplies the norm's input.

    Args:
        gates: every gate whose units lie on the norm's axis, each with its norm, which say the same but for where.
    """

    def __init__(self, gates: Sequence[tuple[SigmoidGate, Norm]]) -> None:
        self.gates = tuple(gates)
        self.norm = gates[0][1]

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        norm = self.norm
        given: Tensor = args[0] if args[0].dtype == torch.float64 else args[0].float()
        x = given.transpose(norm.dim, -1)  # (..., elements of the axis)
        gate = x.new_ones(x.shape[-1])
        for own, at in self.gates:
            gate = multiply_along(gate, own.factor, 0, at.per_unit, at.offsets, at.positions)
        if not norm.multiplied:
            x = x * gate
        if norm.kind == "group":
            normed = self._of_parts(x.transpose(norm.dim, -1), gate).transpose(norm.dim, -1)
        else:
            if norm.kind == "layer":
                x = x - gate * (x.sum(-1, keepdim=True) / gate.sum())
            normed = x * torch.rsqrt(x.square().sum(-1, keepdim=True) / gate.square().sum() + norm.eps)
        scaled = normed.to(output.dtype)
        if getattr(module, "weight", None) is not None:
            scaled = module.weight.flatten() * scaled
        if getattr(module, "bias", None) is not None:
            bias = module.bias.flatten()
            scaled = scaled + (bias * gate.to(output.dtype) if norm.multiplied else bias)
        return scaled.transpose(norm.dim, -1)

    def _of_parts(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalise each part of the second axis with the axes behind it; x is (batch, channels, …), gated."""
        parts = x.reshape(len(x), self.norm.parts, -1, x[0, 0].numel())  # (batch, part, channel, position)
        gates = gate.view(1, self.norm.parts, -1, 1)
        positions = parts.shape[-1]
        mean = parts.sum((2, 3), keepdim=True) / (gates.sum(2, keepdim=True) * positions)
        parts = parts - gates * mean
        count = gates.square().sum(2, keepdim=True) * positions
        variance = parts.square().sum((2, 3), keepdim=True) / count
        return (parts * torch.rsqrt(variance + self.norm.eps)).reshape(x.shape)


class WeightGates:
    """Multiplies the columns of weights that are read by no module's call; the model holds the products meanwhile.

    Passes of several threads may overlap, as when batches wait for a layer side by side: they share the products.
    """

    def __init__(self, model: nn.Module, gates: Sequence[tuple[SigmoidGate, Cut]]) -> None:
        self.model, self.gates = model, tuple(gates)
        self._lock, self._passes = threading.Lock(), 0
        self._originals: dict[tuple[nn.Module, str], nn.Parameter | None] = {}

    def __enter__(self) -> None:
        with self._lock:
            if self._passes:
                self._passes += 1
                return
            products: dict[str, Tensor] = {}
            for gate, cut in self.gates:
                tensor = products.get(cut.tensor, self.model.get_parameter(cut.tensor))
                products[cut.tensor] = multiply_along(
                    tensor, gate.factor, cut.dim, cut.per_unit, cut.offsets, cut.positions
                )
            owners = {id(self.model.get_parameter(name)): product for name, product in products.items()}
            for module in self.model.modules():
                for name, parameter in module._parameters.items():
                    if id(parameter) in owners:
                        self._originals[module, name] = parameter
            for (module, name), parameter in self._originals.items():
                module._parameters[name] = owners[id(parameter)]  # type: ignore[assignment]  # a product is no Parameter
            self._passes = 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._passes -= 1
            if self._passes == 0:
                for (module, name), parameter in self._originals.items():
                    module._parameters[name] = parameter
                self._originals.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightGates:
        gates = [(copy.deepcopy(gate, memo), cut) for gate, cut in self.gates]
        return WeightGates(copy.deepcopy(self.model, memo), gates)


class Student(nn.Module):
    """The teacher's model with a trainable gate on each group.

    Modules are not replaced, so the model's state-dict keys do not change, and after `detach` the model is bit for bit
    what it was. Use the student as a context manager to detach it at the end of a block.

    Args:
        model: the model, which gets hooks in place; pass a copy to leave the original without gates.
        groups: all groups that an adapter declares, or some of them; a parent that is left out counts as kept.
        gate: makes the gate of a group from its number of units.

    Raises:
        ValueError: when a group does not fit the model; nothing is attached then.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], gate: GateFactory = SigmoidGate) -> None:
        super().__init__()
        names = {group.name for group in groups}
        groups = [group if group.parent in names else replace(group, parent=None) for group in groups]
        check_groups(groups, model)
        for group in groups:
            for point in group.gated_at:
                if isinstance(point, GatePoint) and point.side not in ("input", "output"):
                    raise ValueError(
                        f"{group.name}: side {point.side!r} of {point.module} is not input or output; choose one"
                    )
            for norm in group.norms:
                if norm.kind not in ("layer", "rms", "group"):
                    raise ValueError(
                        f"{group.name}: norm kind {norm.kind!r} of {norm.module} is not layer, rms or group; choose one"
                    )
        self.groups = tuple(groups)
        self.model = model
        gates = [gate(group.units) for group in groups]  # a factory that fails leaves the model untouched
        self.gates = nn.ModuleList(gates)
        self._handles: list[Any] = []
        modules = dict(model.named_modules())
        norms: dict[str, list[tuple[SigmoidGate, Norm]]] = {}
        weights: list[tuple[SigmoidGate, Cut]] = []
        for group, group_gate in zip(groups, gates, strict=True):
            for point in group.gated_at:
                if isinstance(point, Cut):
                    weights.append((group_gate, point))
                    continue
                module, hook = modules[point.module], GateHook(group_gate, point)
                attach = module.register_forward_pre_hook if point.side == "input" else module.register_forward_hook
                self._handles.append(attach(hook))
            for norm in group.norms:
                norms.setdefault(norm.module, []).append((group_gate, norm))
        for path, gated in norms.items():
            self._handles.append(modules[path].register_forward_hook(NormHook(gated)))
        self._weight_gates: AbstractContextManager[None] = WeightGates(model, weights) if weights else nullcontext()
        device = next((parameter.device for parameter in model.parameters()), None)
        self.gates.to(device=device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for _, gate in self.groups_and_gates():
            gate.redraw()
        with self._weight_gates:
            return self.model(*args, **kwargs)

    def groups_and_gates(self) -> Iterator[tuple[Group, SigmoidGate]]:
        """Iterate over the groups, each with its gate."""
        # a ModuleList does not know the type of its modules; `__init__` fills it with gates alone
        return zip(self.groups, cast(Iterable[SigmoidGate], self.gates), strict=True)

    def gate_of(self, name: str) -> SigmoidGate:
        """Return the gate of the group of this name."""
        return self._by_name()[name]

    def own_gates(self) -> dict[str, Tensor]:
        """Return each group's gate values, (units,), not multiplied by those of its parents."""
        return {name: gate.gate for name, gate in self._by_name().items()}

    def effective_gates(self) -> dict[str, Tensor]:
        """Return each group's gate values, (units,), times those of its parents."""
        own = self.own_gates()
        parents = {group.name: group.parent for group in self.groups}

        def effective(name: str) -> Tensor:
            parent = parents[name]
            if parent not in own:
                return own[name]
            return own[name] * effective(parent).repeat_interleave(own[name].numel() // own[parent].numel())

        return {name: effective(name) for name in own}

    def soft_widths(self) -> dict[str, Tensor]:
        """Return each group's expected width if its parent stays: a scalar, differentiable in the gates.

        The latency proxy predicts milliseconds from these.
        """
        own = self.own_gates()
        return {group.name: own[group.name].sum() * (group.full_width / group.units) for group in self.groups}

    def detach(self) -> nn.Module:
        """Remove every hook and return the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._weight_gates = nullcontext()
        return self.model

    def __enter__(self) -> Student:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @contextmanager
    def hard_gated(self, keep: Mapping[str, Sequence[int]]) -> Iterator[Student]:
        """Within the block every gate is exactly 1 for the units in `keep` and exactly 0 for the others.

        Args:
            keep: the kept indices of every group; the units of a parent that is removed are removed with it.
        """
        keep = without_orphans(keep, self.groups)
        device = next(self.gates.parameters()).device
        try:
            for group, gate in self.groups_and_gates():
                mask = torch.zeros(group.units, device=device)
                mask[list(keep[group.name])] = 1.0
                gate.hard = mask
            yield self
        finally:
            for _, gate in self.groups_and_gates():
                gate.hard = None

    def _by_name(self) -> dict[str, SigmoidGate]:
        return {group.name: gate for group, gate in self.groups_and_gates()}
