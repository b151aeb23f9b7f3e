"""What students and slim models are to reproduce: the teacher, or another model in its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hawada.adapters import Adapter
from hawada.config import build
from hawada.core.distill import Distillation, OtherTeacher, Outputs, OutputsFunction, TeacherCache
from hawada.core.structure import Keep
from hawada.workspace.subject import Subject


def make_distillation(subject: Subject, keep: Keep | None = None) -> Distillation:
    """As configured; `keep` tells what a slim model still has."""
    node = subject.cfg.distill
    alignment = subject.adapter.alignment(subject.groups, keep) if keep is not None and node.hidden_weight else None
    count = len(subject.data.train) if getattr(subject.data, "repeats", False) else 0  # type: ignore[arg-type]  # images have a length
    return Distillation(
        build(subject.cfg.kd),
        outputs=subject.outputs,
        task=subject.task,
        chunk=node.chunk,
        hidden_weight=node.hidden_weight,
        alignment=alignment,
        other=_other_teacher(subject),
        cache=TeacherCache(count) if count else None,
    )


def check_distillation(subject: Subject, *, trains: bool) -> None:
    """Check quickly that models show what is to be compared, and that another teacher fits; loads no weights.

    Args:
        subject: the model of a stage that distils or compares.
        trains: whether some stage learns from the other teacher.

    Raises:
        ValueError: naming the keys to change.
    """
    node = subject.cfg.distill
    subject.check_features(features=node.chunk is not None, hidden=node.hidden_weight > 0)
    other = _other_adapter(subject) if trains else None
    if other is None:
        return
    if other.modality != subject.adapter.modality:
        raise ValueError(
            f"distill.teacher: {type(other).__name__} takes {other.modality} and {subject.cfg.model.name} "
            f"{subject.adapter.modality} data; choose a teacher that takes the same"
        )
    with _named(), torch.device("meta"):
        other.check_outputs(features=node.chunk is not None, hidden=False)
        other.check_teacher()
        meta = other.skeleton()
    try:
        known, own = subject.classes(other, meta), subject.classes(subject.adapter, subject.meta)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"distill.teacher: it does not take what {subject.cfg.model.name} takes ({error}); choose one that does"
        ) from error
    if known != own:
        raise ValueError(
            f"distill.teacher: it knows {known} classes and {subject.cfg.model.name} {own}; choose one of the same "
            "classes, or for a language model, of the same tokenizer"
        )


@contextmanager
def _named() -> Iterator[None]:
    """Turn messages about the model's keys into messages about those of another teacher."""
    try:
        yield
    except ValueError as error:
        message = str(error).replace(" or model.pretrain=true", "")  # that would train the model itself
        message = message.replace("model.adapter", "distill.teacher").replace("model.path", "distill.teacher.path")
        raise ValueError(message) from error


def _other_adapter(subject: Subject) -> Adapter | None:
    node = subject.cfg.distill.teacher
    with _named():
        return None if node is None else build(node)


def _other_teacher(subject: Subject) -> OtherTeacher | None:
    adapter = _other_adapter(subject)
    if adapter is None:
        return None
    with _named(), torch.random.fork_rng(devices=[]):  # an architecture is drawn before it is filled
        model, theirs = adapter.teacher(), adapter.normalisation()
    ours = getattr(subject.data, "normalisation", None)
    outputs: OutputsFunction = adapter.outputs
    if ours is not None and theirs is not None and [*map(list, ours)] != [*map(list, theirs)]:
        outputs = _Renormalised(outputs, ours, theirs)
    return OtherTeacher(model.to(subject.accelerator.device).eval().requires_grad_(False), outputs)


@dataclass(frozen=True)
class _Renormalised:
    """Shows images to a model that was trained on others: (mean, deviation) per channel of ours and of its own."""

    outputs: OutputsFunction
    ours: tuple[Sequence[float], Sequence[float]]
    theirs: tuple[Sequence[float], Sequence[float]]

    def __call__(self, model: nn.Module, inputs: Tensor, *, features: bool, hidden: bool) -> Outputs:
        (mean, std), (own_mean, own_std) = (
            [torch.tensor(list(part), device=inputs.device).view(-1, 1, 1) for part in pair]
            for pair in (self.ours, self.theirs)
        )
        images = (inputs * std + mean - own_mean) / own_std
        return self.outputs(model, images.to(inputs.dtype), features=features, hidden=hidden)
