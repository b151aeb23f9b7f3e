"""Which units matter, told by gradients before any training: where gates may begin, instead of all alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import norm, rankdata
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hawada.core.distill import IGNORED, Outputs, Reader, plain_reader
from hawada.core.gates import Student
from hawada.core.importance.gates import CalibrationData
from hawada.core.structure import Group


class FisherImportance:
    """The Fisher information of each unit's gate, see `fisher_importance`."""

    def rank(
        self, student: Student, model: nn.Module, *, groups: Sequence[Group], calibration: CalibrationData
    ) -> dict[str, Tensor]:
        """The scores by group, each (units,)."""
        return fisher_importance(student, calibration.batches, calibration.outputs, calibration.chunk)


def fisher_importance(
    student: Student, batches: Iterable[Any], reader: Reader = plain_reader, chunk: int | None = None
) -> dict[str, Tensor]:
    """By gated group, (units,): nats that a sample's answers are expected to lose when one unit alone goes.

    Half the Fisher information of each gate where all gates are 1: squares of the gradients of log-likelihoods (Theis
    et al., Faster gaze prediction with dense networks and Fisher pruning, 2018). Answers are drawn from what the model
    says, independently, so that the square of a batch's gradient is on average the sum of its samples' squares.

    Args:
        student: gated; as before after the call.
        batches: (inputs, …) or (inputs, labels, …); labels only tell which tokens count.
        reader: runs the model; an adapter's `outputs`.
        chunk: make logits from features for so many tokens at a time; None makes them all at once.
    """
    device = next(student.gates.parameters()).device
    masks = [torch.ones(group.units, device=device, requires_grad=True) for group in student.groups]
    totals, samples = [torch.zeros_like(mask) for mask in masks], 0
    try:
        for group, mask in zip(student.groups, masks, strict=True):
            student.gate_of(group.name).hard = mask
        for batch in batches:
            inputs, *rest = (tensor.to(device) for tensor in batch)
            said = reader(student, inputs, features=chunk is not None, hidden=False)
            loss = _surprise(said, rest[0] if rest else None, chunk)
            for total, gradient in zip(totals, torch.autograd.grad(loss, masks), strict=True):
                total += gradient.square()
            samples += len(inputs)
    finally:
        for group in student.groups:
            student.gate_of(group.name).hard = None
    return {group.name: total / (2 * samples) for group, total in zip(student.groups, totals, strict=True)}


def _surprise(said: Outputs, labels: Tensor | None, chunk: int | None) -> Tensor:
    """Minus the log-likelihood of answers drawn from what was said, summed over those that count."""
    rows = said.features if said.logits is None else said.logits
    assert rows is not None
    counts = torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
    if labels is not None and labels.shape == counts.shape:
        counts = labels != IGNORED
    rows = rows[counts]

    def piece(part: Tensor) -> Tensor:
        logits = (part if said.head is None or said.logits is not None else said.head(part)).float()
        drawn = torch.distributions.Categorical(logits=logits.detach(), validate_args=False).sample()
        return F.cross_entropy(logits, drawn, reduction="sum")

    parts = rows.split(chunk or max(len(rows), 1))
    return torch.stack([checkpoint(piece, part, use_reentrant=False) for part in parts]).sum()


@torch.no_grad()
def start_from_importance(student: Student, importance: Mapping[str, Tensor], spread: float) -> None:
    """Move theta up for units that matter and down for others.

    Units are ranked among all of their kind, equals alike, as figures of unlike structures do not compare; ranks are
    spread like a normal distribution: theta moves by `spread` for a unit one standard deviation above the middle.
    """
    for kind in dict.fromkeys(group.kind for group in student.groups):
        names = [group.name for group in student.groups if group.kind == kind]
        values = torch.cat([importance[name] for name in names]).cpu()
        scores = torch.from_numpy(norm.ppf((rankdata(values.numpy()) - 0.5) / len(values)))
        for name, moved in zip(names, scores.split([len(importance[name]) for name in names]), strict=True):
            theta = student.gate_of(name).theta
            theta.add_(spread * moved.to(theta))
