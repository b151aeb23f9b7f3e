"""Knowledge distillation: the losses of a student on a batch, over whole logits or chunks of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hawada.core.distill.losses import hidden_mse
from hawada.core.distill.outputs import Alignment, OtherTeacher, Outputs, OutputsFunction, plain_outputs
from hawada.core.distill.teacher_cache import TeacherCache
from hawada.core.task import IGNORED, Loss, Task


class Distillation:
    """The losses of a student (or of a model that learns from labels alone) on a batch.

    For sequences the losses are taken token by token, and positions whose label is `IGNORED` do not count. Labels are
    already shifted: the label of a position is the next token.

    Args:
        loss: the distillation loss: (student logits, teacher logits) -> mean over samples or tokens; None learns from
            labels alone.
        outputs: runs a model; usually an adapter's `outputs`.
        chunk: the number of tokens whose logits are made from features at a time, so that the logits of a long batch
            never all exist at once; None works on whole logits. The losses are the same either way.
        hidden_weight: the factor of `hidden_mse`; 0 leaves hidden states out.
        alignment: tells which of the teacher's hidden states and units the student's correspond to.
        label_weight: the factor of the task's loss with the labels.
        task: what outputs and labels mean; None is classification.
        other: a teacher whose logits replace the original's; hidden states are still compared with the original's.
        cache: keeps the teacher's logits, for data whose inputs are the same in every epoch. It belongs to one teacher
            and must not be used with another.
    """

    def __init__(
        self,
        loss: Loss | None = None,
        *,
        outputs: OutputsFunction = plain_outputs,
        chunk: int | None = None,
        hidden_weight: float = 0.0,
        alignment: Alignment | None = None,
        label_weight: float = 0.0,
        task: Task | None = None,
        other: OtherTeacher | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        self.task = task or Task()
        self.loss = None if loss is None else self.task.loss(loss)
        self.outputs, self.chunk = outputs, chunk
        self.hidden_weight, self.alignment, self.label_weight = hidden_weight, alignment, label_weight
        self.other, self.cache = other, cache

    def outputs_of(self, model: nn.Module, inputs: Tensor) -> Outputs:
        """Return a model's outputs for inputs of shape (batch, …), in the form that `losses` takes."""
        return self.outputs(model, inputs, features=self.chunk is not None, hidden=self.hidden_weight > 0)

    @torch.no_grad()
    def targets(self, teacher: nn.Module, inputs: Tensor, numbers: Tensor | None = None) -> Outputs:
        """Return the outputs that the student is to reproduce for a batch, in the form that `losses` takes.

        Args:
            teacher: the frozen unpruned model, in eval mode.
            inputs: the batch, (batch, …).
            numbers: the samples' indices in the data set, (batch,); None when the data does not give them, and then
                the cache is not used.
        """
        with_states = self.outputs_of(teacher, inputs) if self.hidden_weight > 0 else None
        if with_states is not None and self.other is None:
            return with_states
        model, run = (teacher, self.outputs) if self.other is None else (self.other.model, self.other.outputs)

        def compute(inputs: Tensor) -> Outputs:
            return run(model, inputs, features=self.chunk is not None, hidden=False)

        def compute_logits(inputs: Tensor) -> Tensor:
            logits = compute(inputs).logits
            assert logits is not None  # models return features instead only when `chunk` is set
            return logits

        if self.cache is None or numbers is None or self.chunk is not None:
            targets = compute(inputs)
        else:
            targets = Outputs(self.cache.logits(inputs, numbers, compute_logits))
        return targets if with_states is None else replace(targets, hidden=with_states.hidden)

    def losses(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the weighted terms of the loss, each a scalar: `kd` and `hidden` with a teacher, `label` with labels.

        Args:
            student: the student's outputs.
            teacher: the targets for the same inputs, or None.
            labels: (batch,), or (batch, tokens) of next tokens; None when there are none.

        Raises:
            ValueError: when hidden states are to be compared and the student's outputs have none.
        """
        positions = student.features if student.logits is None else student.logits  # one row for each position
        assert positions is not None
        labels = None if labels is None else self.task.labels_of(labels, positions)
        valid = None  # a mask of the positions that count; None when all do
        if labels is not None and labels.shape == positions.shape[:-1] and bool((labels == IGNORED).any()):
            valid = labels != IGNORED
            if not bool(valid.any()):
                return {"kd": positions.sum() * 0.0}  # no position counts: the loss is 0 and still has a gradient
        if student.logits is not None:
            targets = None if teacher is None else teacher.logits
            terms = self._terms(*(_valid(x, valid) for x in (student.logits, targets, labels)))
        else:
            terms = self._chunked_terms(student, teacher, labels, valid)
        if teacher is not None and self.hidden_weight:
            if not student.hidden:
                raise ValueError(
                    f"distill.hidden_weight: {self.hidden_weight} compares hidden states, and this model returns "
                    "no hidden states; set it to 0"
                )
            terms["hidden"] = self.hidden_weight * hidden_mse(student.hidden, teacher.hidden, self.alignment, valid)
        return terms

    def _terms(self, student: Tensor | None, teacher: Tensor | None, labels: Tensor | None) -> dict[str, Tensor]:
        """The terms `kd` and `label` for logits (..., classes) of which every position counts."""
        terms: dict[str, Tensor] = {}
        assert student is not None
        if teacher is not None and self.loss is not None:
            terms["kd"] = self.loss(student, teacher)
        if labels is not None and self.label_weight > 0:
            terms["label"] = self.label_weight * self.task.label_loss(student, labels)
        return terms

    def _chunked_terms(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor | None, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """The same terms from features: one chunk's logits exist at a time, and the backward pass recomputes them."""
        student_rows = _token_rows(student.features, valid)  # (tokens, width)
        teacher_rows = None if teacher is None else _token_rows(teacher.features, valid)
        label_rows = None if labels is None else (labels.flatten() if valid is None else labels[valid])
        assert student_rows is not None and student.head is not None
        names: list[str] = []  # of the terms, which `checkpoint` returns without names

        def terms_of_chunk(*tensors: Any) -> Any:
            features, teacher_features, chunk_labels = tensors
            assert student.head is not None
            targets = (
                None
                if teacher_features is None or teacher is None or teacher.head is None
                else teacher.head(teacher_features)
            )
            terms = self._terms(student.head(features), targets, chunk_labels)
            names[:] = list(terms)
            return tuple(terms.values())

        sums: dict[str, Tensor] = {}
        size = self.chunk or len(student_rows)
        for start in range(0, len(student_rows), size):
            part = slice(start, start + size)
            tensors = [None if x is None else x[part] for x in (student_rows, teacher_rows, label_rows)]
            values = checkpoint(terms_of_chunk, *tensors, use_reentrant=False)
            for name, value in zip(names, values, strict=True):
                share = len(student_rows[part]) / len(student_rows)
                sums[name] = sums.get(name, value.new_zeros(())) + value * share
        return sums


def _valid(x: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """Return the valid positions of a tensor, (positions, ...); the tensor itself when all are valid."""
    return x if x is None or valid is None else x[valid]


def _token_rows(x: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """Turn (batch, tokens, width) into (valid tokens, width)."""
    return None if x is None else (x.flatten(0, -2) if valid is None else x[valid])
