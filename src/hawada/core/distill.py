"""Knowledge distillation: what a model says, and the student's words against the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hawada.core.answer_cache import AnswerCache

IGNORED = -100  # a label that does not count: padding, or the end of a text
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


@dataclass(frozen=True)
class Outputs:
    """What a model says about a batch: logits, or the features from which a head makes them a few tokens at a time.

    Attributes:
        logits: (batch, classes) or (batch, tokens, classes); None when features and head are given.
        features: what the head takes, (batch, tokens, width).
        head: features -> logits.
        hidden: states before the first layer and after each one, (batch, tokens, width); empty unless asked for.
    """

    logits: Tensor | None
    features: Tensor | None = None
    head: Callable[[Tensor], Tensor] | None = None
    hidden: tuple[Tensor, ...] = ()


class Reader(Protocol):
    """Runs a model on a batch's inputs."""

    def __call__(self, model: nn.Module, inputs: Tensor, *, features: bool, hidden: bool) -> Outputs: ...


def plain_reader(model: nn.Module, inputs: Tensor, *, features: bool = False, hidden: bool = False) -> Outputs:
    """For models that return logits and nothing else."""
    return Outputs(model(inputs))


@dataclass(frozen=True)
class OtherTeacher:
    """A frozen model of another architecture, whose answers the student is to give instead of the original's.

    Attributes:
        model: in eval mode, where the student trains; it takes the same inputs and knows the same classes.
        reader: runs it; its adapter's `outputs`.
    """

    model: nn.Module
    reader: Reader = plain_reader


@dataclass(frozen=True)
class Alignment:
    """Which of the teacher's hidden states and units the student still has.

    Attributes:
        states: for each of the student's hidden states, the index of the teacher's that it answers to.
        units: the teacher's units of the hidden stream that the student kept, or None for all.
    """

    states: tuple[int, ...]
    units: tuple[int, ...] | None = None


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


class Distillation:
    """The losses of a student (or of a model that learns from labels alone) on a batch.

    Token by token for sequences: positions whose label is `IGNORED` do not count. Labels are already shifted: the label
    of a position is the next token.

    Args:
        loss: (student logits, teacher logits) -> mean over samples or tokens; None learns from labels alone.
        reader: runs a model; an adapter's `outputs`.
        chunk: compute losses from features for so many tokens at a time, so that the logits of a long batch never
            exist at once; None works on whole logits. The result is the same.
        hidden_weight: factor of `hidden_mse`; 0 leaves hidden states alone.
        alignment: of the student's hidden states with the teacher's.
        label_weight: factor of the cross-entropy with the labels.
        other: gives the answers in the teacher's place; hidden states are compared with the teacher's all the same.
        cache: of the answers, for data whose inputs are the same in every epoch; of one teacher, so not to be shared.
    """

    def __init__(
        self,
        loss: Loss | None = None,
        *,
        reader: Reader = plain_reader,
        chunk: int | None = None,
        hidden_weight: float = 0.0,
        alignment: Alignment | None = None,
        label_weight: float = 0.0,
        other: OtherTeacher | None = None,
        cache: AnswerCache | None = None,
    ) -> None:
        self.loss, self.reader, self.chunk = loss, reader, chunk
        self.hidden_weight, self.alignment, self.label_weight = hidden_weight, alignment, label_weight
        self.other, self.cache = other, cache

    def read(self, model: nn.Module, inputs: Tensor) -> Outputs:
        """What a model says, in the form that the losses need."""
        return self.reader(model, inputs, features=self.chunk is not None, hidden=self.hidden_weight > 0)

    @torch.no_grad()
    def wanted(self, teacher: nn.Module, inputs: Tensor, numbers: Tensor | None = None) -> Outputs:
        """What the student is to say about a batch, in the form that the losses need.

        Args:
            teacher: frozen, in eval mode.
            inputs: (batch, …).
            numbers: of the samples in the data set, (batch,), where it gives them; see `cache`.
        """
        shown = self.read(teacher, inputs) if self.hidden_weight > 0 else None
        if shown is not None and self.other is None:
            return shown
        model, reader = (teacher, self.reader) if self.other is None else (self.other.model, self.other.reader)

        def ask(inputs: Tensor) -> Outputs:
            return reader(model, inputs, features=self.chunk is not None, hidden=False)

        def logits(inputs: Tensor) -> Tensor:
            said = ask(inputs).logits
            assert said is not None  # there is no chunk
            return said

        if self.cache is None or numbers is None or self.chunk is not None:
            answers = ask(inputs)
        else:
            answers = Outputs(self.cache.take(inputs, numbers, logits))
        return answers if shown is None else replace(answers, hidden=shown.hidden)

    def losses(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> dict[str, Tensor]:
        """The weighted terms: `kd` and `hidden` with a teacher, `label` with labels; scalars whose sum is the loss.

        Args:
            student: what the student said.
            teacher: what the teacher said about the same inputs, or None.
            labels: (batch,), or (batch, tokens) of next tokens; None when there are none.
        """
        scored = student.features if student.logits is None else student.logits
        assert scored is not None
        valid = None
        if labels is not None and labels.shape == scored.shape[:-1] and bool((labels == IGNORED).any()):
            valid = labels != IGNORED
            if not bool(valid.any()):
                return {"kd": scored.sum() * 0.0}  # nothing counts; the graph stays whole
        if student.logits is not None:
            wanted = None if teacher is None else teacher.logits
            terms = self._terms(*(_pick(x, valid) for x in (student.logits, wanted, labels)))
        else:
            terms = self._chunked(student, teacher, labels, valid)
        if teacher is not None and self.hidden_weight:
            if not student.hidden:
                raise ValueError("distill.hidden_weight: this model shows no hidden states; set it to 0")
            terms["hidden"] = self.hidden_weight * hidden_mse(student.hidden, teacher.hidden, self.alignment, valid)
        return terms

    def _terms(self, student: Tensor | None, teacher: Tensor | None, labels: Tensor | None) -> dict[str, Tensor]:
        """Losses of logits whose every position counts, (..., classes)."""
        terms: dict[str, Tensor] = {}
        assert student is not None
        if teacher is not None and self.loss is not None:
            terms["kd"] = self.loss(student, teacher)
        if labels is not None and self.label_weight > 0:
            terms["label"] = self.label_weight * F.cross_entropy(student.float().flatten(0, -2), labels.flatten())
        return terms

    def _chunked(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor | None, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """The same from features: logits of one chunk at a time, made again in the backward pass."""
        own = _rows(student.features, valid)  # (tokens, width)
        wanted = None if teacher is None else _rows(teacher.features, valid)
        targets = None if labels is None else (labels.flatten() if valid is None else labels[valid])
        assert own is not None and student.head is not None
        names: list[str] = []

        def piece(*tensors: Any) -> Any:
            features, said, target = tensors
            assert student.head is not None
            theirs = None if said is None or teacher is None or teacher.head is None else teacher.head(said)
            terms = self._terms(student.head(features), theirs, target)
            names[:] = list(terms)
            return tuple(terms.values())

        sums: dict[str, Tensor] = {}
        for start in range(0, len(own), self.chunk or len(own)):
            part = slice(start, start + (self.chunk or len(own)))
            tensors = [None if x is None else x[part] for x in (own, wanted, targets)]
            values = checkpoint(piece, *tensors, use_reentrant=False)
            for name, value in zip(names, values, strict=True):
                sums[name] = sums.get(name, value.new_zeros(())) + value * (len(own[part]) / len(own))
        return sums


def _pick(x: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """The valid positions, (tokens, ...); everything when all are valid."""
    return x if x is None or valid is None else x[valid]


def _rows(x: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """(batch, tokens, width) -> (valid tokens, width)."""
    return None if x is None else (x.flatten(0, -2) if valid is None else x[valid])
