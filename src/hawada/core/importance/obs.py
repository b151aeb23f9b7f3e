"""The OBS importance: which units of a group can be removed at the least error once its consumer is refitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hawada.core.gates import Student
from hawada.core.importance.gates import CalibrationData
from hawada.core.reconstruction import Moments, input_rows, is_centred, is_linear, layer_input_and_output, output_rows
from hawada.core.structure import Cut, Group

UNITS_LEFT_PER_REMOVAL = 16  # a step removes one in so many of the units that are left, and at least one


class ObsImportance:
    """The order in which a group's consumer can replace its units, see `obs_ranks`.

    Groups with several consumers, or one that is not plainly linear, get no rank here; they are ranked by their gates.
    Ranks of different groups cannot be compared: the sensitivity of the groups must be measured.
    """

    def rank(
        self, student: Student, model: nn.Module, *, groups: Sequence[Group], calibration: CalibrationData
    ) -> dict[str, Tensor]:
        """The ranks by group, each (units,)."""
        return obs_ranks(model, groups, calibration.batches)


@torch.no_grad()
def obs_ranks(teacher: nn.Module, groups: Sequence[Group], batches: Sequence[Any]) -> dict[str, Tensor]:
    """By group, each unit's rank in [1, units], shape (units,); the unit that is removed last has the highest.

    Units are removed one after the other. Each time it is the unit without which the group's consumer can be refitted
    with the least squared error, and the other units take over its part before the next one is chosen (Hassibi and
    Stork, Second order derivatives for network pruning: Optimal brain surgeon, 1992; whole structures are removed at
    once as in Kurtić et al., ZipLM: Inference-aware structured pruning of language models, 2023).

    Args:
        teacher: the ungated model, in eval mode.
        groups: the model's groups. A group is ranked when its only consumer is a linear layer or a convolution, and
            left out otherwise.
        batches: calibration data: (inputs, …), a few hundred samples in all.
    """
    ranks: dict[str, Tensor] = {}
    for group in groups:
        consumer = _consumer(teacher, group)
        if consumer is not None:
            covariance, weights, positions = _problem(teacher, group, consumer, batches)
            ranks[group.name] = elimination_ranks(covariance, weights, positions).cpu()
    return ranks


def _consumer(teacher: nn.Module, group: Group) -> Cut | None:
    """The cut of a group's only consumer; None when there are several, or when the layer is not linear."""
    cuts = [cut for cut in group.cuts if cut.dim == 1 and cut.tensor.endswith(".weight")]
    if len(cuts) == 1 and is_linear(teacher.get_submodule(cuts[0].tensor.rpartition(".")[0])):
        return cuts[0]
    return None


def _problem(teacher: nn.Module, group: Group, consumer: Cut, batches: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What `elimination_ranks` takes: the consumer's input covariance with its ridge, its weights, units' positions."""
    module: Any = teacher.get_submodule(consumer.tensor.rpartition(".")[0])
    weights = module.weight.flatten(1).T.double()
    kernel = module.weight[0, 0].numel()
    moments = Moments(*weights.shape, centred=is_centred(teacher, module))
    for batch in batches:
        layer_input, layer_output = layer_input_and_output(teacher, module, batch[0].to(weights.device))
        moments.add(input_rows(module, layer_input), output_rows(module, layer_output))
    elements = torch.stack([consumer.elements([unit]) for unit in range(group.units)]).to(weights.device)
    positions = (elements[..., None] * kernel + torch.arange(kernel, device=weights.device)).flatten(1)
    return moments.definite(), weights, positions


def elimination_ranks(covariance: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
    """The order in which units are removed, as ranks: (units,), 1 for the first.

    Args:
        covariance: the covariance of a layer's n inputs, (n, n), positive definite.
        weights: the layer's weights, (n, outputs).
        positions: for each unit, which of the n inputs belong to it, (units, k).
    """
    units, inverse = len(positions), torch.linalg.inv(covariance)
    weights, left = weights.clone(), torch.arange(units, device=covariance.device)
    ranks = torch.zeros(units, device=covariance.device)
    while len(left):
        own = positions[left]  # (left, k)
        blocks = inverse[own[:, :, None], own[:, None, :]]  # (left, k, k)
        errors = (weights[own] * torch.linalg.solve(blocks, weights[own])).sum((1, 2))
        removed = errors.argsort(stable=True)[: max(1, len(left) // UNITS_LEFT_PER_REMOVAL)]
        ranks[left[removed]] = (
            torch.arange(len(removed), device=ranks.device, dtype=ranks.dtype) + 1 + units - len(left)
        )
        rows = own[removed].flatten()
        solved = torch.linalg.solve(inverse[rows[:, None], rows], torch.cat([weights[rows], inverse[rows]], dim=1))
        column = inverse[:, rows]
        weights = weights - column @ solved[:, : weights.shape[1]]
        inverse = inverse - column @ solved[:, weights.shape[1] :]
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[removed] = False
        left = left[stays]
    return ranks
