"""What each width costs in quality, measured: one group thinned at a time, the loss of the answer read off."""

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

REMEMBERED = 2**26  # elements of the teacher's answers that are kept, rather than asked for again each time


@dataclass(frozen=True)
class Sensitivity:
    """Nats by which the answers move away from the teacher's when one group alone is thinned.

    Attributes:
        costs: by group, width -> nats per answer; 0 at the full width. Groups that are thinned together share a figure.
    """

    costs: Mapping[str, Mapping[int, float]]

    def worth(self, group: Group, width: int) -> float:
        """What keeping `width` units is worth: minus the nats that it costs; nothing for what was not measured."""
        known = self.costs.get(group.name)
        if known is None:
            return 0.0
        widths = sorted(known)
        return -float(np.interp(width, widths, [known[w] for w in widths]))

    def as_dict(self) -> dict[str, dict[str, float]]:
        """For JSON."""
        return {name: {str(width): nats for width, nats in costs.items()} for name, costs in self.costs.items()}


class AnswerLoss:
    """How far a choice of units moves the answers away from the teacher's, once the readers are refitted.

    Args:
        student: gated; its weights are as before after every call.
        teacher: whose answers are the right ones, in eval mode on the same device.
        model: an ungated copy of the student's model, whose layers readers are refitted to; None: the teacher.
        fitted: batches (inputs, …) that readers are refitted on; none leaves them as they are.
        judged: other batches (inputs, …) or (inputs, labels, …), on which answers are compared; labels only tell which
            tokens count.
        distillation: runs a model; its loss is the cost, in nats where it is the divergence at temperature 1.
    """

    def __init__(
        self,
        student: Student,
        teacher: nn.Module,
        *,
        model: nn.Module | None = None,
        fitted: Sequence[Any],
        judged: Sequence[Any],
        distillation: Distillation,
    ) -> None:
        self.student, self.teacher, self.distillation = student, teacher, distillation
        self.model, self.fitted, self.judged = model or teacher, fitted, judged
        self._answers: dict[int, Outputs] = {}
        self._known: dict[tuple[tuple[int, ...], ...], float] = {}
        everything = {group.name: tuple(range(group.units)) for group in student.groups}
        self._unmoved = self._moved(everything)  # BatchNorm by the batch differs from the teacher's in any case

    @torch.no_grad()
    def __call__(self, keep: Mapping[str, Sequence[int]]) -> float:
        """Nats per answer; `keep` holds every gated group, others are looked over."""
        keep = {group.name: tuple(keep[group.name]) for group in self.student.groups}
        choice = tuple(tuple(kept) for kept in keep.values())
        if choice not in self._known:
            before = self._weights(keep) if self.fitted else {}
            if self.fitted:
                reconstruct(self.student, self.model, keep, self.fitted)
            self._known[choice] = self.without_refit(keep)
            for parameter, weight in before.items():
                parameter.copy_(weight)
        return self._known[choice]

    @torch.no_grad()
    def without_refit(self, keep: Mapping[str, Sequence[int]]) -> float:
        """The same with the readers as they are."""
        return self._moved({group.name: keep[group.name] for group in self.student.groups}) - self._unmoved

    def _weights(self, keep: Mapping[str, Sequence[int]]) -> dict[nn.Parameter, Tensor]:
        """Copies of what compensation is going to change."""
        with self.student.hard_gated(keep):
            paths = consumers(self.student, self.model, keep, self.fitted[0][0])
        changing = [p for path in paths for p in self.student.model.get_submodule(path).parameters()]
        return {parameter: parameter.clone() for parameter in changing}

    @torch.no_grad()
    def _moved(self, keep: Mapping[str, Sequence[int]]) -> float:
        with self.student.hard_gated(keep), batch_statistics(self.student):
            moved = sum(self._distance(index) * len(batch[0]) for index, batch in enumerate(self.judged))
        return moved / sum(len(batch[0]) for batch in self.judged)

    def _distance(self, index: int) -> float:
        """On one batch; the teacher's answers are remembered where they are little."""
        device = next(self.student.model.parameters()).device
        inputs, *rest = (tensor.to(device) for tensor in self.judged[index])
        said = self._answers.get(index) or self.distillation.outputs_of(self.teacher, inputs)
        shown = said.features if said.logits is None else said.logits
        if shown is not None and shown.numel() * len(self.judged) <= REMEMBERED:
            self._answers[index] = said
        own = self.distillation.outputs_of(self.student, inputs)
        return float(self.distillation.losses(own, said, rest[0] if rest else None)["kd"])


def measure_sensitivity(
    loss: AnswerLoss,
    groups: Sequence[Group],
    policy: ExportPolicy,
    order: Mapping[str, Tensor],
    *,
    points: int = 5,
    on_group: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Thin one group (or those that must be alike) at a time, and see what it costs.

    Args:
        loss: of a choice of units.
        groups: every group; those without a gate stay whole.
        policy: allowed widths, and what is thinned together.
        order: by group, (units,), larger is kept longer.
        points: widths of a group that are tried, the smallest and the full one among them.
        on_group: called with the group's name when it is done.
    """
    gated = {group.name for group in loss.student.groups}
    first = {name: best_first(values) for name, values in order.items()}
    full = full_widths(groups)
    costs: dict[str, dict[int, float]] = {}
    for members in policy.shared(groups):
        if not all(member.name in gated for member in members):
            continue
        allowed, group = policy.widths(members[0]), members[0]
        tried = sorted(
            {allowed[round(place)] for place in np.linspace(0, len(allowed) - 1, points)} | {group.full_width}
        )
        nats = {group.full_width: 0.0}
        for width in reversed([width for width in tried if width < group.full_width]):
            change = dict.fromkeys((member.name for member in members), width)
            keep = completed(keep_first(groups, {**full, **change}, first), groups)
            nats[width] = max(loss(keep), nats[min(nats)])  # never better with less
        shared = {width: cost / len(members) for width, cost in nats.items()}
        costs |= dict.fromkeys((member.name for member in members), shared)
        if on_group is not None:
            on_group(group.name)
    return Sensitivity(costs)
