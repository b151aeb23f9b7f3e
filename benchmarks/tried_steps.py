"""Pruning in steps, which was tried without gain: some of the finetuning comes before the last pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hawada.core.finetune import recalibrate_batchnorm
from hawada.core.search import search_export
from hawada.core.structure import Keep, plan_edits
from hawada.report import Progress
from hawada.stages.export import load_student, make_search, measuring
from hawada.workspace import ModelStopwatch, Quality, load_proxy


def in_steps(
    watch: ModelStopwatch,
    ratios: tuple[float, ...],
    samples: tuple[int, ...],
    calibration: Callable[[], DataLoader],
    finetune: Callable[[nn.Module, int], nn.Module],
) -> tuple[nn.Module, float]:
    """Bring a network to each fraction of the teacher's time in turn, and finetune it there on so many images.

    The widths, importance and reconstruction of a step start from the network of the step before.

    Returns:
        The last network, and the fraction of the time that it is predicted to take.

    Raises:
        ValueError: when a fraction cannot be reached.
    """
    model, slim, predicted = watch.subject.teacher(), watch.subject.teacher(), 1.0
    for ratio, count in zip(ratios, samples, strict=True):
        keep, slim, predicted = _exported(watch, model, ratio)
        recalibrate_batchnorm(slim, calibration())
        slim = finetune(slim, count)
        model = spread(watch, model, slim, keep)
    return slim, predicted


def _exported(watch: ModelStopwatch, model: nn.Module, ratio: float) -> tuple[Keep, nn.Module, float]:
    """Export a model as `stage=export` exports the teacher."""
    teacher = watch.subject.teacher()
    student = load_student(watch.subject, teacher)
    student.model.load_state_dict(model.state_dict())
    with Progress("step", 1) as progress, measuring(watch, student.model, teacher) as measure:
        quality = Quality(watch.subject, student, teacher, progress, has_target=True)
        search = make_search(
            watch, student, quality, measure, watch.budget_for(ratio), load_proxy(watch.subject, "train")
        )
        found = search_export(search, watch.cfg.export.max_measurements)
    if found.status == "infeasible":
        raise ValueError(f"{ratio} of the teacher's time cannot be reached")
    chosen = found.chosen
    slim, _ = quality.reconstructed(watch.subject.slim(student.model, chosen.keep), chosen.keep)
    return chosen.keep, slim, chosen.comparison.ratio.median


@torch.no_grad()
def spread(watch: ModelStopwatch, model: nn.Module, slim: nn.Module, keep: Keep) -> nn.Module:
    """Make a network of the full size that computes what the slim one does: the units that were removed are zero."""
    whole = copy.deepcopy(model)
    removed, small = plan_edits(whole, watch.subject.groups, keep).removed, slim.state_dict()
    for name, tensor in whole.state_dict().items():
        if name in small:
            places = _staying(tensor, removed.get(name, {}))
            if name in removed:
                tensor.fill_(1.0 if name.endswith("running_var") else 0.0)
            tensor[torch.meshgrid(*places, indexing="ij") if places else ()] = small[name]
    for group in watch.subject.groups:
        if group.removes and not keep[group.name]:
            norm = whole.get_submodule(group.gated_at[0].module)
            for parameter in norm.parameters():
                parameter.zero_()
    return whole


def _staying(tensor: Tensor, removed: dict[int, Tensor]) -> list[Tensor]:
    """List for each axis the positions that stay."""
    places = []
    for dim, size in enumerate(tensor.shape):
        stays = torch.ones(size, dtype=torch.bool)
        stays[removed.get(dim, torch.empty(0, dtype=torch.long))] = False
        places.append(stays.nonzero().flatten())
    return places
