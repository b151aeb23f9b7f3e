"""What HawAda is compared with: Torch-Pruning and uniform widths, each brought to a latency by its own ratio."""

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

STEPS = 7  # bisections of a baseline's ratio
HIGHEST = (0.8, 0.85, 0.9, 0.95)  # where they begin; beyond, Torch-Pruning leaves whole layers as they are

Pruner = Callable[[float], nn.Module]  # ratio of removed channels -> pruned copy of the teacher


def of_torch_pruning(name: str, network: Network, watch: ModelStopwatch, teacher: nn.Module) -> Pruner:
    """Torch-Pruning, global, on every layer but the classifier, or on channels inside blocks alone."""
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
    """The same fraction of every inner convolution's filters, the largest ones."""
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
    """The smallest pruning ratio that bisection finds whose model is at or under the target; None where none is."""
    low = 0.0
    for high in HIGHEST:
        if ratio_of(prune(high)) <= target:
            break
    else:
        return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        if ratio_of(prune(middle)) <= target:
            high = middle
        else:
            low = middle
    return high
