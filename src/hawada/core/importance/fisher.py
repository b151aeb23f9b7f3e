"""The Fisher importance, which scores units by gradients before gates are trained, and gates that start from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from scipy.stats import norm, rankdata
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hawada.core.distill import Outputs, OutputsFunction, plain_outputs
from hawada.core.gates import Student
from hawada.core.importance.gates import CalibrationData
from hawada.core.structure import Group
from hawada.core.task import IGNORED, Task


class FisherImportance:
    """The Fisher information of each unit's gate, see `fisher_importance`."""

    def rank(
        self, student: Student, model: nn.Module, *, groups: Sequence[Group], calibration: CalibrationData
    ) -> dict[str, Tensor]:
        """Return the scores by group, each (units,)."""
        return fisher_importance(student, calibration.batches, calibration.outputs, calibration.chunk, calibration.task)


def fisher_importance(
    student: Student,
    batches: Iterable[Any],
    outputs: OutputsFunction = plain_outputs,
    chunk: int | None = None,
    task: Task | None = None,
) -> dict[str, Tensor]:
    """Estimate how far a model's predictions move when one unit alone is removed.

    The estimate is half the Fisher information of the unit's gate where all gates are 1; that is the mean squared
    gradient of the log-likelihood (Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018).
    Labels are drawn independently from the model's own predictions, so that on average the square of a batch's gradient
    is the sum of the squares of its samples' gradients.

    Args:
        student: the gated model; the call leaves it as it was.
        batches: calibration data: (inputs, …) or (inputs, labels, …); labels only tell which tokens count.
        outputs: runs the model; usually an adapter's `outputs`.
        chunk: the number of tokens whose logits are made from features at a time; None makes them all at once.
        task: what the outputs mean; None is classification.

    Returns:
        By gated group, (units,): the expected divergence of the predictions per sample, in nats.
    """
    device = next(student.gates.parameters()).device
    masks = [torch.ones(group.units, device=device, requires_grad=True) for group in student.groups]
    totals, samples = [torch.zeros_like(mask) for mask in masks], 0
    try:
        for group, mask in zip(student.groups, masks, strict=True):
            student.gate_of(group.name).hard = mask
        for batch in batches:
            inputs, *rest = (tensor.to(device) for tensor in batch)
            model_outputs = outputs(student, inputs, features=chunk is not None, hidden=False)
            loss = _sampled_nll(model_outputs, rest[0] if rest else None, chunk, task or Task())
            for total, gradient in zip(totals, torch.autograd.grad(loss, masks), strict=True):
                total += gradient.square()
            samples += len(inputs)
    finally:
        for group in student.groups:
            student.gate_of(group.name).hard = None
    return {group.name: total / (2 * samples) for group, total in zip(student.groups, totals, strict=True)}


def _sampled_nll(outputs: Outputs, labels: Tensor | None, chunk: int | None, task: Task) -> Tensor:
    """Return the negative log-likelihood of labels drawn from the predictions, summed over the positions that count."""
    rows = outputs.features if outputs.logits is None else outputs.logits
    assert rows is not None
    valid = torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
    if labels is not None and task.labels_of(labels, rows).shape == valid.shape:
        valid = task.labels_of(labels, rows) != IGNORED
    rows = rows[valid]

    def nll_of_chunk(part: Tensor) -> Tensor:
        logits = part if outputs.head is None or outputs.logits is not None else outputs.head(part)
        return task.sampled_nll(logits.float())

    parts = torch.split(rows, chunk or max(len(rows), 1))
    return torch.stack([checkpoint(nll_of_chunk, part, use_reentrant=False) for part in parts]).sum()


@torch.no_grad()
def start_from_importance(student: Student, importance: Mapping[str, Tensor], spread: float) -> None:
    """Move theta, the raw parameter of a gate, up for units of high importance and down for units of low importance.

    Units are ranked among all units of their kind, because the importances of different kinds cannot be compared; equal
    importances get equal ranks. Ranks are mapped to the quantiles of a normal distribution.

    Args:
        student: the gated model, whose thetas change.
        importance: each group's importance, (units,).
        spread: how far theta moves for a unit one standard deviation above the median.
    """
    for kind in dict.fromkeys(group.kind for group in student.groups):
        names = [group.name for group in student.groups if group.kind == kind]
        values = torch.cat([importance[name] for name in names]).cpu()
        quantiles = torch.from_numpy(norm.ppf((rankdata(values.numpy()) - 0.5) / len(values)))
        parts = torch.split(quantiles, [len(importance[name]) for name in names])
        for name, part in zip(names, parts, strict=True):
            theta = student.gate_of(name).theta
            theta.add_(spread * part.to(theta))
