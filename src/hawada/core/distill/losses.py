"""Losses of a student's outputs against the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hawada.core.distill.outputs import Alignment

Loss = Callable[[Tensor, Tensor], Tensor]


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)), averaged over all axes but the last.

    Hinton et al., Distilling the Knowledge in a Neural Network, 2015. Both logits have shape (..., classes); computed
    in float32.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return divergence.mean() * temperature**2


def mse_reg(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of the raw logits, in float32: ties their offset, which the KL does not see."""
    return F.mse_loss(student_logits.float(), teacher_logits.float())


@dataclass(frozen=True)
class KDConfig:
    """The distillation loss: `kd_loss + mse_weight * mse_reg`, called with (student_logits, teacher_logits).

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
    """Mean squared difference of hidden states, each relative to the teacher's mean square; a scalar in float32.

    Widths and depths may differ: dropped units and layers of the teacher are left out of the comparison.

    Args:
        student: states of shape (batch, tokens, width).
        teacher: likewise, possibly wider and more.
        alignment: None when both have the same shape.
        valid: (batch, tokens), True where a token counts.
    """
    states = range(len(student)) if alignment is None else alignment.states
    units = None if alignment is None or alignment.units is None else list(alignment.units)
    total = student[0].new_zeros((), dtype=torch.float32)
    for own, index in zip(student, states, strict=True):
        wanted = teacher[index] if units is None else teacher[index][..., units]
        own, wanted = (own, wanted) if valid is None else (own[valid], wanted[valid])
        wanted = wanted.float()
        total = total + F.mse_loss(own.float(), wanted) / wanted.square().mean().clamp_min(1e-12)
    return total / len(student)
