"""Losses of a student's outputs against the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hawada.core.distill.outputs import Alignment


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)), averaged over all axes but the last; in nats.

    This is the distillation loss of Hinton et al., Distilling the Knowledge in a Neural Network, 2015. Both logits have
    shape (..., classes), tau is `temperature`, and the result is a scalar that is computed in float32.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return divergence.mean() * temperature**2


def mse_reg(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The mean squared difference of the raw logits, a scalar in float32.

    It also matches the logits' common offset, on which the KL divergence does not depend.
    """
    return F.mse_loss(student_logits.float(), teacher_logits.float())


@dataclass(frozen=True)
class KDConfig:
    """The distillation loss: `kd_loss + mse_weight * mse_reg`, called with (student_logits, teacher_logits).

    Attributes:
        temperature: the tau of `kd_loss`.
        mse_weight: the factor of `mse_reg`; 0 leaves the term out.

    Raises:
        ValueError: when temperature is not above 0 or mse_weight is negative.
    """

    temperature: float = 2.0
    mse_weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"kd.temperature: {self.temperature} is not above 0; 1 to 4 are usual")
        if not self.mse_weight >= 0:
            raise ValueError(f"kd.mse_weight: {self.mse_weight} is negative; 0 switches the term off")

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        loss = kd_loss(student_logits, teacher_logits, self.temperature)
        return loss + self.mse_weight * mse_reg(student_logits, teacher_logits) if self.mse_weight else loss


def hidden_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    alignment: Alignment | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The mean squared difference of hidden states, each relative to the teacher's mean square; a scalar in float32.

    Widths and depths may differ: the teacher's units and layers that the student lost are left out of the comparison.

    Args:
        student: the student's hidden states, each (batch, tokens, width).
        teacher: the teacher's hidden states, which may be wider and more.
        alignment: tells which of the teacher's states and units to compare with; None when both have the same shape.
        valid: (batch, tokens), True where a token counts; None counts all of them.
    """
    states = range(len(student)) if alignment is None else alignment.states
    units = None if alignment is None or alignment.units is None else list(alignment.units)
    total = student[0].new_zeros((), dtype=torch.float32)
    for own, index in zip(student, states, strict=True):
        target = teacher[index] if units is None else teacher[index][..., units]
        own, target = (own, target) if valid is None else (own[valid], target[valid])
        target = target.float()
        total = total + F.mse_loss(own.float(), target) / target.square().mean().clamp_min(1e-12)
    return total / len(student)
