"""Knowledge distillation: the student's outputs against the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


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
