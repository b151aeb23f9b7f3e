"""The baselines: Torch-Pruning and uniform widths, each brought to a latency by its own pruning ratio."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from networks import Network
from torch import nn

from hawada.core.structure import completed, keep_first, widths_of
from hawada.workspace import ModelStopwatch

BISECTION_STEPS = 7  # of a baseline's pruning ratio
INITIAL_PRUNING_RATIOS = (
    0.8,
    0.85,
    0.9,
    0.95,
)  # Bisection begins at the first that is fast enough; above the last, Torch-Pruning leaves whole layers unpruned.

Pruner = Callable[[float], nn.Module]  # ratio of removed channels -> pruned copy of the teacher


def of_torch_pruning(name: str, network: Network, watch: ModelStopwatch, teacher: nn.Module) -> Pruner:
    """Prune with Torch-Pruning, globally over every layer but the classifier, or over channels inside blocks only."""
    layers = {path for path, module in teacher.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    classifier = next(path for path in reversed(list(dict(teacher.named_modules()))) if path in layers)
    inner = {group.name for group in watch.subject.groups if group.kind == "channel"}
    pruned = inner if network.inner else layers - {classifier}
    importances: dict[str, Callable[[], Any]] = {
        "taylor": tp.importance.GroupTaylorImportance,
        "magnitude": tp.importance.GroupMagnitudeImportance,
        "random": tp.importance.RandomImportance,
    }

    def prune(ratio: float) -> nn.Module:
        torch.manual_seed(0)
        model = copy.deepcopy(teacher).cpu()
        if name == "taylor":
            for images, labels in watch.subject.data.calibration_loader(network.recipe.batch, network.calibration):
                F.cross_entropy(model(images.cpu()), labels.cpu()).backward()
        ignored = [model.get_submodule(path) for path in layers - pruned]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.BasePruner(
                model,
                watch.subject.check_inputs()[0],
                importances[name](),
                global_pruning=True,
                pruning_ratio=ratio,
                max_pruning_ratio=0.95,
                ignored_layers=ignored,
                round_to=network.multiple,
            )
            pruner.step()
        model.zero_grad(set_to_none=True)
        return model.eval()

    return prune


def of_uniform(_: str, network: Network, watch: ModelStopwatch, teacher: nn.Module) -> Pruner:
    """Prune every inner convolution to the same fraction of its filters, those with the largest weights."""
    sizes = {
        g.name: teacher.get_parameter(f"{g.name}.weight").flatten(1).norm(dim=1) for g in watch.subject.groups if g.cuts
    }
    order = {name: size.argsort(descending=True).tolist() for name, size in sizes.items()}

    def prune(ratio: float) -> nn.Module:
        widths = widths_of(completed({}, watch.subject.groups), watch.subject.groups)
        for group in watch.subject.groups:
            if group.cuts:
                kept = round((1 - ratio) * group.units / network.multiple) * network.multiple
                widths[group.name] = min(max(kept, network.multiple), group.units)
        return watch.subject.slim(teacher, keep_first(watch.subject.groups, widths, order))

    return prune


def brought_to(target: float, prune: Pruner, ratio_of: Callable[[nn.Module], float]) -> float | None:
    """Find by bisection the smallest pruning ratio whose model is at or under the target; None where there is none."""
    low = 0.0
    for high in INITIAL_PRUNING_RATIOS:
        if ratio_of(prune(high)) <= target:
            break
    else:
        return None
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        if ratio_of(prune(middle)) <= target:
            high = middle
        else:
            low = middle
    return high
