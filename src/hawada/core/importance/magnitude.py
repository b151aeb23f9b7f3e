"""The importance that needs neither training nor data: how large a unit's weights are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hawada.core.gates import Student
from hawada.core.importance.gates import CalibrationData
from hawada.core.structure import Cut, Group


class Magnitude:
    """The L2 norm of the weights that are cut with a unit (Li et al., Pruning filters for efficient ConvNets, 2017).

    Groups without an axis to cut, such as residual branches, get no score; they are ranked by their gates.
    """

    @torch.no_grad()
    def rank(
        self, student: Student, model: nn.Module, *, groups: Sequence[Group], calibration: CalibrationData
    ) -> dict[str, Tensor]:
        """Return the scores by group, each (units,)."""
        weights = dict(model.named_parameters(remove_duplicate=False))
        scores: dict[str, Tensor] = {}
        for group in groups:
            squares = [
                _squares(weights[cut.tensor], cut, group.units)
                for cut in group.cuts
                if cut.tensor in weights  # buffers, such as a norm's statistics, are not weights
            ]
            if squares:
                scores[group.name] = torch.stack(squares).sum(0).sqrt()
        return scores


def _squares(weight: Tensor, cut: Cut, units: int) -> Tensor:
    """For each unit, sum the squares of the tensor's elements that belong to it; returns (units,)."""
    by_position = weight.double().square().movedim(cut.dim, 0).reshape(weight.shape[cut.dim], -1).sum(1)
    return torch.stack([by_position[cut.elements([unit]).to(by_position.device)].sum() for unit in range(units)])
