"""Which units matter, told by gradients before any training: where gates may begin, instead of all alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hawada.core.distill import IGNORED, Reader, plain_reader
from hawada.core.student import Student


def fisher_importance(student: Student, batches: Iterable[Any], reader: Reader = plain_reader) -> dict[str, Tensor]:
    """By gated group, (units,): nats that a sample's answers are expected to lose when one unit alone goes.

    Half the Fisher information of each gate where all gates are 1: squares of the gradients of log-likelihoods (Theis
    et al., Faster gaze prediction with dense networks and Fisher pruning, 2018). Answers are drawn from what the model
    says, independently, so that the square of a batch's gradient is on average the sum of its samples' squares.

    Args:
        student: gated; as before after the call.
        batches: (inputs, …) or (inputs, labels, …); labels only tell which tokens count.
        reader: runs the model; an adapter's `outputs`.
    """
    device = next(student.gates.parameters()).device
    masks = [torch.ones(group.units, device=device, requires_grad=True) for group in student.groups]
    totals, samples = [torch.zeros_like(mask) for mask in masks], 0
    try:
        for group, mask in zip(student.groups, masks, strict=True):
            student.gate_of(group.name).hard = mask
        for batch in batches:
            inputs, *rest = (tensor.to(device) for tensor in batch)
            logits = reader(student, inputs, features=False, hidden=False).logits
            assert logits is not None
            drawn = torch.distributions.Categorical(logits=logits.detach().float()).sample()
            if rest and rest[0].shape == drawn.shape:
                drawn[rest[0] == IGNORED] = IGNORED
            loss = F.cross_entropy(
                logits.float().flatten(0, -2), drawn.flatten(), reduction="sum", ignore_index=IGNORED
            )
            for total, gradient in zip(totals, torch.autograd.grad(loss, masks), strict=True):
                total += gradient.square()
            samples += len(inputs)
    finally:
        for group in student.groups:
            student.gate_of(group.name).hard = None
    return {group.name: total / (2 * samples) for group, total in zip(student.groups, totals, strict=True)}


@torch.no_grad()
def start_from_importance(student: Student, importance: Mapping[str, Tensor], spread: float) -> None:
    """Move theta up for units that matter and down for others.

    Units are ranked among all of their kind, as figures of unlike structures do not compare, and ranks are spread like
    a normal distribution: theta moves by `spread` for a unit that is one standard deviation above the middle.
    """
    for kind in dict.fromkeys(group.kind for group in student.groups):
        names = [group.name for group in student.groups if group.kind == kind]
        values = torch.cat([importance[name] for name in names])
        ranks = values.argsort(stable=True).argsort().double()
        scores = torch.special.ndtri((ranks + 0.5) / len(ranks)).to(values.dtype)
        for name, moved in zip(names, scores.split([len(importance[name]) for name in names]), strict=True):
            student.gate_of(name).theta.add_(spread * moved)
