"""Knowledge distillation: the losses of a student on a batch, whole or in chunks of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hawada.core.distill.losses import Loss, hidden_mse
from hawada.core.distill.outputs import IGNORED, Alignment, OtherTeacher, Outputs, Reader, plain_reader
from hawada.core.distill.teacher_cache import AnswerCache


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
