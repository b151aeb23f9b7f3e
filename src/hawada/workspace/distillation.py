"""What students and slim models are to reproduce: the teacher, or in its place another model's answers."""

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
from hawada.workspace.workspace import Workspace


def make_distillation(work: Workspace, keep: Keep | None = None) -> Distillation:
    """As configured; `keep` tells what a slim model still has."""
    node = work.cfg.distill
    alignment = work.adapter.alignment(work.groups, keep) if keep is not None and node.hidden_weight else None
    count = len(work.data.train) if getattr(work.data, "repeats", False) else 0  # type: ignore[arg-type]
    return Distillation(
        build(work.cfg.kd),
        outputs=work.adapter.outputs,
        chunk=node.chunk,
        hidden_weight=node.hidden_weight,
        alignment=alignment,
        other=_other_teacher(work),
        cache=TeacherCache(count) if count else None,
    )


def check_distillation(work: Workspace, *, trains: bool) -> None:
    """Check quickly that models show what is to be compared, and that another teacher fits; loads no weights.

    Args:
        work: of a stage that distils or compares.
        trains: whether some stage learns from the other teacher.

    Raises:
        ValueError: naming the keys to change.
    """
    node = work.cfg.distill
    work.adapter.check_outputs(features=node.chunk is not None, hidden=node.hidden_weight > 0)
    other = _other_adapter(work) if trains else None
    if other is None:
        return
    if other.modality != work.adapter.modality:
        raise ValueError(
            f"distill.teacher: {type(other).__name__} takes {other.modality} and {work.cfg.model.name} "
            f"{work.adapter.modality} data; choose a teacher that takes the same"
        )
    with _named(), torch.device("meta"):
        other.check_outputs(features=node.chunk is not None, hidden=False)
        other.check_teacher()
        meta = other.skeleton()
    try:
        known, wanted = work.classes(other, meta), work.classes(work.adapter, work.meta)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"distill.teacher: it does not take what {work.cfg.model.name} takes ({error}); choose one that does"
        ) from error
    if known != wanted:
        raise ValueError(
            f"distill.teacher: it knows {known} classes and {work.cfg.model.name} {wanted}; choose one of the same "
            "classes, or for a language model, of the same tokenizer"
        )


@contextmanager
def _named() -> Iterator[None]:
    """What adapters say of their keys, said of those of another teacher's."""
    try:
        yield
    except ValueError as error:
        said = str(error).replace(" or model.pretrain=true", "")  # that would train the model itself
        said = said.replace("model.adapter", "distill.teacher").replace("model.path", "distill.teacher.path")
        raise ValueError(said) from error


def _other_adapter(work: Workspace) -> Adapter | None:
    node = work.cfg.distill.teacher
    with _named():
        return None if node is None else build(node)


def _other_teacher(work: Workspace) -> OtherTeacher | None:
    adapter = _other_adapter(work)
    if adapter is None:
        return None
    with _named(), torch.random.fork_rng(devices=[]):  # an architecture is drawn before it is filled
        model, theirs = adapter.teacher(), adapter.normalisation()
    ours = getattr(work.data, "normalisation", None)
    outputs: OutputsFunction = adapter.outputs
    if ours is not None and theirs is not None and [*map(list, ours)] != [*map(list, theirs)]:
        outputs = _Renormalised(outputs, ours, theirs)
    return OtherTeacher(model.to(work.accelerator.device).eval().requires_grad_(False), outputs)


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
