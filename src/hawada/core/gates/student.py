"""`Student`: a model and its gates as one module, joined by hooks; without them the model is what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hawada.core.gates.gates import SigmoidGate, multiply_along
from hawada.core.structure import GatePoint, Group, ModelHook, Norm, check_groups, without_orphans

GateFactory = Callable[[int], SigmoidGate]
"""A function that makes a gate for a number of units."""


class GateHook(ModelHook):
    """Multiplies a module's first input, or its first output, by a gate."""

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
    """Computes a norm again with statistics over the kept units: a gate of 0 takes a unit out of mean and variance.

    If all gates are equal, the result is the norm's output times that gate. The output of a unit whose gate is 0 is
    exactly 0.
    """

    def __init__(self, gate: SigmoidGate, norm: Norm) -> None:
        self.gate = gate
        self.norm = norm

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        gate = self.gate.factor
        x = args[0].float()  # (..., units); the hook of the module that made it has already multiplied it by the gate
        if self.norm.kind == "layer":
            x = x - gate * (x.sum(-1, keepdim=True) / gate.sum())
        variance = x.square().sum(-1, keepdim=True) / gate.square().sum()
        normed = (x * torch.rsqrt(variance + self.norm.eps)).to(output.dtype)
        scaled: Tensor = module.weight * normed
        if self.norm.kind == "layer":
            scaled = scaled + module.bias * gate.to(output.dtype)
        return scaled


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
                if point.side not in ("input", "output"):
                    raise ValueError(
                        f"{group.name}: side {point.side!r} of {point.module} is not input or output; choose one"
                    )
            for norm in group.norms:
                if norm.kind not in ("layer", "rms"):
                    raise ValueError(
                        f"{group.name}: norm kind {norm.kind!r} of {norm.module} is not layer or rms; choose one"
                    )
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
        for _, gate in self.groups_and_gates():
            gate.redraw()
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
