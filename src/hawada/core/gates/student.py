"""`Student`: a model and its gates as one module, joined by hooks that come off without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hawada.core.gates.gates import SigmoidGate, multiply_along
from hawada.core.structure import GatePoint, Group, ModelHook, Norm, check_groups, without_orphans

GateFactory = Callable[[int], SigmoidGate]


class GateHook(ModelHook):
    """Multiplies a module's input or output by a gate."""

    def __init__(self, gate: SigmoidGate, point: GatePoint) -> None:
        self.gate = gate
        self.point = point

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> Any:
        x, *rest = args if self.point.side == "input" else (output if isinstance(output, tuple) else (output,))
        x = multiply_along(x, self.gate.factor, self.point.dim, self.point.per_unit, self.point.offsets)
        if self.point.side == "input" or isinstance(output, tuple):
            return (x, *rest)
        return x


class NormHook(ModelHook):
    """Computes a norm again with statistics over the kept units: gate 0 takes a unit out of mean and variance.

    With all gates equal it is the norm times that gate; removed units come out as exactly 0.
    """

    def __init__(self, gate: SigmoidGate, norm: Norm) -> None:
        self.gate = gate
        self.norm = norm

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        gate = self.gate.factor
        x = args[0].float()  # (..., units), already multiplied by the gate where it was written
        if self.norm.kind == "layer":
            x = x - gate * (x.sum(-1, keepdim=True) / gate.sum())
        variance = x.square().sum(-1, keepdim=True) / gate.square().sum()
        normed = (x * torch.rsqrt(variance + self.norm.eps)).to(output.dtype)
        scaled = module.weight * normed
        return scaled if self.norm.kind == "rms" else scaled + module.bias * gate.to(output.dtype)


class Student(nn.Module):
    """The teacher's model with a trainable gate on each group.

    Modules are not replaced, so the model's state-dict keys do not change, and `detach` restores it bit for bit.
    Use it as a context manager to detach at the end of a block.

    Args:
        model: gated in place; hand in a copy to leave the original free.
        groups: an adapter's declaration, or part of it; a parent that is left out counts as kept.
        gate: makes a gate from a unit count.

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
                if point.side not in ("input", "output"):
                    raise ValueError(f"{group.name}: side {point.side!r} of {point.module} is not input or output")
            for norm in group.norms:
                if norm.kind not in ("layer", "rms"):
                    raise ValueError(f"{group.name}: norm kind {norm.kind!r} of {norm.module} is not layer or rms")
        self.groups = tuple(groups)
        self.model = model
        gates = [gate(group.units) for group in groups]  # a factory that fails leaves the model untouched
        self.gates = nn.ModuleList(gates)
        self._handles: list[Any] = []
        modules = dict(model.named_modules())
        for group, group_gate in zip(groups, gates, strict=True):
            for point in group.gated_at:
                module, hook = modules[point.module], GateHook(group_gate, point)
                attach = module.register_forward_pre_hook if point.side == "input" else module.register_forward_hook
                self._handles.append(attach(hook))
            for norm in group.norms:
                self._handles.append(modules[norm.module].register_forward_hook(NormHook(group_gate, norm)))
        device = next((parameter.device for parameter in model.parameters()), None)
        self.gates.to(device=device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for gate in self.gates:
            gate.redraw()  # type: ignore[operator]
        return self.model(*args, **kwargs)

    def gate_of(self, name: str) -> SigmoidGate:
        """The gate of one group."""
        return self._by_name()[name]

    def own_gates(self) -> dict[str, Tensor]:
        """Each group's gate values, (units,), as if its parent stayed."""
        return {name: gate.gate for name, gate in self._by_name().items()}

    def effective_gates(self) -> dict[str, Tensor]:
        """Each group's gate values, (units,), times those of its parents."""
        own = self.own_gates()
        parents = {group.name: group.parent for group in self.groups}

        def effective(name: str) -> Tensor:
            parent = parents[name]
            if parent not in own:
                return own[name]
            return own[name] * effective(parent).repeat_interleave(own[name].numel() // own[parent].numel())

        return {name: effective(name) for name in own}

    def soft_widths(self) -> dict[str, Tensor]:
        """Expected width of each group given that its parent stays: differentiable scalars for a proxy."""
        own = self.own_gates()
        return {group.name: own[group.name].sum() * (group.full_width / group.units) for group in self.groups}

    def detach(self) -> nn.Module:
        """Remove every hook and hand back the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return self.model

    def __enter__(self) -> Student:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @contextmanager
    def hard_gated(self, keep: Mapping[str, Sequence[int]]) -> Iterator[Student]:
        """Within the block every gate is exactly 1 for the units in `keep` and 0 for the others."""
        keep = without_orphans(keep, self.groups)
        device = next(self.gates.parameters()).device
        try:
            for group, gate in zip(self.groups, self.gates, strict=True):
                mask = torch.zeros(group.units, device=device)
                mask[list(keep[group.name])] = 1.0
                gate.hard = mask
            yield self
        finally:
            for gate in self.gates:
                gate.hard = None  # type: ignore[assignment]

    def _by_name(self) -> dict[str, SigmoidGate]:
        return {group.name: gate for group, gate in zip(self.groups, self.gates, strict=True)}  # type: ignore[misc]
