"""What an importance is, and the one that reads the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from hawada.core.distill import OutputsFunction, plain_outputs
from hawada.core.gates import Student
from hawada.core.structure import Group
from hawada.core.task import Task


@dataclass(frozen=True)
class CalibrationData:
    """The training samples that an importance may read, and how a model is run on them.

    Attributes:
        batches: (inputs, …) or (inputs, labels, …).
        outputs: runs a model on the inputs of a batch; an adapter's `outputs`.
        chunk: logits are made for so many tokens at a time; None makes them all at once.
        task: what the outputs mean; None is classification.
    """

    batches: Sequence[Any]
    outputs: OutputsFunction = plain_outputs
    chunk: int | None = None
    task: Task | None = None


class Importance(Protocol):
    """A score for every unit: in each group, units with larger scores are kept longer."""

    def rank(
        self, student: Student, model: nn.Module, *, groups: Sequence[Group], calibration: CalibrationData
    ) -> dict[str, Tensor]:
        """The scores by group, each (units,); a group that is left out is ranked by its gates.

        Args:
            student: the gated model in eval mode; it must be as before after the call.
            model: the same model without gates, in eval mode on the same device; it must not change either.
            groups: the groups that are gated.
            calibration: training samples.
        """
        ...


def importance_from_gates(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Effective gates, each divided by its group's unit count: a wide group does not matter more for being wide."""
    return {name: gate.detach() / gate.numel() for name, gate in gates.items()}


class Gates:
    """The trained gates, each times the gates of the units that it lies inside."""

    def rank(
        self, student: Student, model: nn.Module, *, groups: Sequence[Group], calibration: CalibrationData
    ) -> dict[str, Tensor]:
        """The scores by group, each (units,)."""
        return importance_from_gates(student.effective_gates())


def rank_units(
    importance: Importance,
    student: Student,
    model: nn.Module,
    *,
    groups: Sequence[Group],
    calibration: CalibrationData,
) -> dict[str, Tensor]:
    """The scores that an importance gives, on the CPU; see `Importance.rank`.

    Raises:
        ValueError: when they are not one finite number a unit.
    """
    scores = importance.rank(student, model, groups=groups, calibration=calibration)
    for group in groups:
        found = scores.get(group.name)
        if found is not None and (tuple(found.shape) != (group.units,) or not bool(found.isfinite().all())):
            raise ValueError(
                f"export.importance: {type(importance).__name__} gives {group.name} scores of shape "
                f"{tuple(found.shape)} for {group.units} units; return one finite score for each unit"
            )
    return {name: found.detach().cpu() for name, found in scores.items()}
