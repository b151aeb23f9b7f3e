"""Which units of a group are missed least, when those that stay may make up for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hawada.core.gates import Student
from hawada.core.importance.gates import CalibrationData
from hawada.core.reconstruction import Moments, input_rows, is_centred, is_linear, output_rows, seen
from hawada.core.structure import Cut, Group

AT_ONCE = 16  # one in so many of the units that are left goes before errors are computed again, and at least one


class ObsImportance:
    """The order in which a group's consumer can replace its units, see `reconstruction_ranks`.

    Groups with several consumers, or one that is not plainly linear, are left to their gates. Ranks of different
    groups cannot be compared: the sensitivity of the groups must be measured.
    """

    def rank(
        self, student: Student, model: nn.Module, *, groups: Sequence[Group], calibration: CalibrationData
    ) -> dict[str, Tensor]:
        """The ranks by group, each (units,)."""
        return reconstruction_ranks(model, groups, calibration.batches)


@torch.no_grad()
def reconstruction_ranks(teacher: nn.Module, groups: Sequence[Group], batches: Sequence[Any]) -> dict[str, Tensor]:
    """By group, (units,): ranks in [1, units], the last to go highest; groups of which no one layer reads are left out.

    Units go one after the other, each time the one without which the layer that reads the group can be refitted with
    the least squared error; the others take over its part before the next is looked for (Hassibi and Stork, Second
    order derivatives for network pruning: Optimal brain surgeon, 1992; whole structures at once as in Kurtić et al.,
    ZipLM: Inference-aware structured pruning of language models, 2023).

    Args:
        teacher: ungated, in eval mode.
        groups: its declaration. A group is ranked when a single linear layer or convolution reads it.
        batches: (inputs, …), a few hundred samples in all.
    """
    ranks: dict[str, Tensor] = {}
    for group in groups:
        reader = _reader(teacher, group)
        if reader is not None:
            covariance, weights, positions = _problem(teacher, group, reader, batches)
            ranks[group.name] = elimination_ranks(covariance, weights, positions).cpu()
    return ranks


def _reader(teacher: nn.Module, group: Group) -> Cut | None:
    """The cut of the one layer that reads a group."""
    cuts = [cut for cut in group.cuts if cut.dim == 1 and cut.tensor.endswith(".weight")]
    if len(cuts) == 1 and is_linear(teacher.get_submodule(cuts[0].tensor.rpartition(".")[0])):
        return cuts[0]
    return None


def _problem(teacher: nn.Module, group: Group, reader: Cut, batches: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance of what the reader is given (n, n), made definite; its weights (n, outputs); units' positions."""
    module: Any = teacher.get_submodule(reader.tensor.rpartition(".")[0])
    weights = module.weight.flatten(1).T.double()
    kernel = module.weight[0, 0].numel()
    moments = Moments(*weights.shape, centred=is_centred(teacher, module))
    for batch in batches:
        given, said = seen(teacher, module, batch[0].to(weights.device))
        moments.add(input_rows(module, given), output_rows(module, said))
    elements = torch.stack([reader.elements([unit]) for unit in range(group.units)]).to(weights.device)
    positions = (elements[..., None] * kernel + torch.arange(kernel, device=weights.device)).flatten(1)
    return moments.definite(), weights, positions


def elimination_ranks(covariance: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
    """The order in which units go, as ranks: (units,), 1 for the first.

    Args:
        covariance: of the inputs, (n, n), positive definite.
        weights: (n, outputs).
        positions: which of the n inputs belong to each unit, (units, k).
    """
    units, inverse = len(positions), torch.linalg.inv(covariance)
    weights, alive = weights.clone(), torch.arange(units, device=covariance.device)
    ranks = torch.zeros(units, device=covariance.device)
    while len(alive):
        own = positions[alive]  # (alive, k)
        blocks = inverse[own[:, :, None], own[:, None, :]]  # (alive, k, k)
        errors = (weights[own] * torch.linalg.solve(blocks, weights[own])).sum((1, 2))
        going = errors.argsort(stable=True)[: max(1, len(alive) // AT_ONCE)]
        ranks[alive[going]] = torch.arange(len(going), device=ranks.device, dtype=ranks.dtype) + 1 + units - len(alive)
        rows = own[going].flatten()
        taken = torch.linalg.solve(inverse[rows[:, None], rows], torch.cat([weights[rows], inverse[rows]], dim=1))
        column = inverse[:, rows]
        weights = weights - column @ taken[:, : weights.shape[1]]
        inverse = inverse - column @ taken[:, weights.shape[1] :]
        stays = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        stays[going] = False
        alive = alive[stays]
    return ranks
