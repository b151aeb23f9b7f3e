"""What each width costs in quality: one group is pruned at a time, and the output divergence is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hawada.core.distill import Distillation, Outputs
from hawada.core.gates import Student
from hawada.core.reconstruction import batch_statistics, consumers, reconstruct
from hawada.core.structure import ExportPolicy, Group, best_first, completed, full_widths, keep_first

MAX_CACHED_TEACHER_ELEMENTS = 2**26  # of the teacher's outputs; more are computed anew each time they are needed


@dataclass(frozen=True)
class Sensitivity:
    """The output divergence when one group alone is pruned to a width.

    Attributes:
        costs: by group, width -> output divergence in nats per sample or token; 0 at the full width. Groups that are
            pruned together share what was measured equally.
    """

    costs: Mapping[str, Mapping[int, float]]

    def divergence(self, group: Group, width: int) -> float:
        """The output divergence with `width` units, interpolated linearly; 0 for a group that was not measured."""
        known = self.costs.get(group.name)
        if known is None:
            return 0.0
        widths = sorted(known)
        return float(np.interp(width, widths, [known[w] for w in widths]))

    def as_dict(self) -> dict[str, dict[str, float]]:
        """For JSON."""
        return {name: {str(width): cost for width, cost in costs.items()} for name, costs in self.costs.items()}


class OutputDivergence:
    """How far a choice of units moves the outputs away from the teacher's, once the consumers are reconstructed.

    Args:
        student: gated; its weights are as before after every call.
        teacher: its outputs are the targets; in eval mode on the same device.
        model: an ungated copy of the student's model, to whose layers the consumers are refitted; None: the teacher.
        refit_on: batches (inputs, …) that consumers are refitted on; without any they stay as they are.
        compare_on: other batches (inputs, …) or (inputs, labels, …), on which outputs are compared; labels only tell
            which tokens count.
        distillation: runs a model; its loss is the divergence, in nats where its temperature is 1.
    """

    def __init__(
        self,
        student: Student,
        teacher: nn.Module,
        *,
        model: nn.Module | None = None,
        refit_on: Sequence[Any],
        compare_on: Sequence[Any],
        distillation: Distillation,
    ) -> None:
        self.student, self.teacher, self.distillation = student, teacher, distillation
        self.model, self.refit_on, self.compare_on = model or teacher, refit_on, compare_on
        self._targets: dict[int, Outputs] = {}
        self._known: dict[tuple[tuple[int, ...], ...], float] = {}
        everything = {group.name: tuple(range(group.units)) for group in student.groups}
        # With its BatchNorm statistics taken from the batch, even the whole model differs from the teacher.
        self._of_whole_model = self._distance(everything)

    @torch.no_grad()
    def __call__(self, keep: Mapping[str, Sequence[int]]) -> float:
        """Nats per sample or token; `keep` has an entry for every gated group, other entries are ignored."""
        keep = {group.name: tuple(keep[group.name]) for group in self.student.groups}
        choice = tuple(tuple(kept) for kept in keep.values())
        if choice not in self._known:
            before = self._weights(keep) if self.refit_on else {}
            if self.refit_on:
                reconstruct(self.student, self.model, keep, self.refit_on)
            self._known[choice] = self.without_reconstruction(keep)
            for parameter, weight in before.items():
                parameter.copy_(weight)
        return self._known[choice]

    @torch.no_grad()
    def without_reconstruction(self, keep: Mapping[str, Sequence[int]]) -> float:
        """The same with the consumers as they are."""
        return self._distance({group.name: keep[group.name] for group in self.student.groups}) - self._of_whole_model

    def _weights(self, keep: Mapping[str, Sequence[int]]) -> dict[nn.Parameter, Tensor]:
        """Copies of what reconstruction is going to change."""
        with self.student.hard_gated(keep):
            paths = consumers(self.student, self.model, keep, self.refit_on[0][0])
        changing = [p for path in paths for p in self.student.model.get_submodule(path).parameters()]
        return {parameter: parameter.clone() for parameter in changing}

    @torch.no_grad()
    def _distance(self, keep: Mapping[str, Sequence[int]]) -> float:
        """The mean divergence over all batches, by their numbers of samples."""
        with self.student.hard_gated(keep), batch_statistics(self.student):
            total = sum(self._distance_on(index) * len(batch[0]) for index, batch in enumerate(self.compare_on))
        return total / sum(len(batch[0]) for batch in self.compare_on)

    def _distance_on(self, index: int) -> float:
        """The divergence on one batch; the teacher's outputs are kept for the next call where they are small."""
        device = next(self.student.model.parameters()).device
        inputs, *rest = (tensor.to(device) for tensor in self.compare_on[index])
        targets = self._targets.get(index) or self.distillation.outputs_of(self.teacher, inputs)
        largest = targets.features if targets.logits is None else targets.logits
        if largest is not None and largest.numel() * len(self.compare_on) <= MAX_CACHED_TEACHER_ELEMENTS:
            self._targets[index] = targets
        outputs = self.distillation.outputs_of(self.student, inputs)
        return float(self.distillation.losses(outputs, targets, rest[0] if rest else None)["kd"])


def measure_sensitivity(
    divergence: OutputDivergence,
    groups: Sequence[Group],
    policy: ExportPolicy,
    importance: Mapping[str, Tensor],
    *,
    points: int = 5,
    on_group: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Prune one group (or those that must be alike) at a time, and measure how far the outputs move.

    Args:
        divergence: of a choice of units.
        groups: every group; those without a gate stay whole.
        policy: allowed widths, and what is pruned together.
        importance: by group, (units,), larger is kept longer.
        points: widths of a group that are tried, the smallest and the full one among them.
        on_group: called with the group's name when it is done.
    """
    gated = {group.name for group in divergence.student.groups}
    order = {name: best_first(values) for name, values in importance.items()}
    full = full_widths(groups)
    costs: dict[str, dict[int, float]] = {}
    for members in policy.shared(groups):
        if not all(member.name in gated for member in members):
            continue
        allowed, group = policy.widths(members[0]), members[0]
        tried = sorted(
            {allowed[round(place)] for place in np.linspace(0, len(allowed) - 1, points)} | {group.full_width}
        )
        found = {group.full_width: 0.0}
        for width in reversed([width for width in tried if width < group.full_width]):
            change = dict.fromkeys((member.name for member in members), width)
            keep = completed(keep_first(groups, {**full, **change}, order), groups)
            found[width] = max(divergence(keep), found[min(found)])  # never better with fewer units
        shared = {width: cost / len(members) for width, cost in found.items()}
        costs |= dict.fromkeys((member.name for member in members), shared)
        if on_group is not None:
            on_group(group.name)
    return Sensitivity(costs)
