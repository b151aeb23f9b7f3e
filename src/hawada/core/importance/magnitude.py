"""The importance that needs neither training nor data: how large a unit's weights are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hawada.core.gates import Student
from hawada.core.importance.gates import CalibrationData
from hawada.core.structure import Cut, Group


class Magnitude:
    """The L2 norm of all weights that go with a unit (Li et al., Pruning filters for efficient ConvNets, 2017).

    Groups without an axis to cut, such as residual branches, are left to their gates.
    """

    @torch.no_grad()
    def rank(
        self, student: Student, model: nn.Module, *, groups: Sequence[Group], calibration: CalibrationData
    ) -> dict[str, Tensor]:
        """The scores by group, each (units,)."""
        weights = dict(model.named_parameters(remove_duplicate=False))
        scores: dict[str, Tensor] = {}
        for group in groups:
            squares = [
                _squares(weights[cut.tensor], cut, group.units)
                for cut in group.cuts
                if cut.tensor in weights  # buffers, such as a norm's statistics, are no weights
            ]
            if squares:
                scores[group.name] = torch.stack(squares).sum(0).sqrt()
        return scores


def _squares(weight: Tensor, cut: Cut, units: int) -> Tensor:
    """The sum of the squares of a tensor's elements that belong to each unit: (units,)."""
    along = weight.double().square().movedim(cut.dim, 0).reshape(weight.shape[cut.dim], -1).sum(1)
    return torch.stack([along[cut.elements([unit]).to(along.device)].sum() for unit in range(units)])
