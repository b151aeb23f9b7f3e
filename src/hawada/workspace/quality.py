"""What the export knows of quality: importance of units, sensitivity to widths, and reconstruction."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from hawada.config import build
from hawada.core.distill import Distillation, KDConfig
from hawada.core.finetune import recalibrate_batchnorm
from hawada.core.gates import Student
from hawada.core.importance import (
    CalibrationData,
    Importance,
    OutputDivergence,
    Sensitivity,
    importance_from_gates,
    measure_sensitivity,
    rank_units,
)
from hawada.core.reconstruction import reconstruct
from hawada.core.search import ImportanceObjective, Objective, SensitivityObjective
from hawada.core.structure import Keep
from hawada.report import Progress
from hawada.workspace.workspace import Workspace


class Quality:
    """As configured under `export` and `calibration`, from the gates and training data, which are read when it is made.

    Half of the data is for refitting layers while the sensitivity is measured, the other half for comparing outputs.

    Args:
        work: of the stage.
        student: the gated model; not changed.
        teacher: the original.
        progress: told what is going on.

    Attributes:
        importance: by gated group, (units,), larger is kept longer.
        sensitivity: the output divergence of each width; None where importance decides.
        divergence: of a whole choice of units, in nats per sample or token; None likewise.
        objectives: what the search goes by, and others that propose widths to it.
    """

    def __init__(self, work: Workspace, student: Student, teacher: nn.Module, progress: Progress) -> None:
        self.work, self.node, samples = work, work.cfg.export, work.cfg.calibration.samples
        self.student, self.teacher = student, teacher
        gates = importance_from_gates(student.effective_gates())
        self.importance: dict[str, Tensor] = dict(gates)
        self.sensitivity: Sensitivity | None = None
        self.divergence: OutputDivergence | None = None
        self.objectives: list[Objective] = [ImportanceObjective(work.groups, gates)]
        self.batches: list[Any] = []
        measured = self.node.sensitivity == "measured" and self.node.widths == "allocation" and work.budget.has_target
        if not samples or not (measured or self.node.reconstruct):
            return
        size = min(work.cfg.calibration.batch_size, max(samples // 2, 1))
        batches = list(work.data.calibration_loader(size, samples))
        self.batches = [batch for batch in batches if len(batch[0]) > 1] or batches  # BatchNorm needs more than one
        if measured:
            self._measure(progress)

    def compensated(self, slim: nn.Module, keep: Keep) -> tuple[nn.Module, dict[str, Any]]:
        """The slim model with refitted weights and BatchNorm statistics of its own, if that is better.

        Args:
            slim: what slicing alone made.
            keep: what it was sliced to.

        Returns:
            The better of the two models, and for the record: how many layers were `refitted`, and the output
            divergence of slicing alone and of slicing with a refit, where such were measured.
        """
        if not self.node.reconstruct or not self.batches:
            return slim, {"refitted": 0}
        nats: dict[str, Any] = {}
        if self.divergence is not None:
            nats = {"nats": {"sliced": self.divergence.without_reconstruction(keep), "refitted": self.divergence(keep)}}
            if nats["nats"]["refitted"] > nats["nats"]["sliced"]:
                return slim, {"refitted": 0, **nats}
        student = self._placed(self.student)
        layers = reconstruct(student, self._ungated(), {g.name: keep[g.name] for g in student.groups}, self.batches)
        refitted = self.work.slim(student.model, keep)
        recalibrate_batchnorm(refitted, self.batches)
        return refitted.cpu(), {"refitted": len(layers), **nats}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {} if self.sensitivity is None else {"sensitivity": self.sensitivity.as_dict()}

    def _measure(self, progress: Progress) -> None:
        """Importance, and sensitivity."""
        work, half = self.work, max(1, len(self.batches) // 2)
        refit_on, compare_on = self.batches[:half], self.batches[half:] or self.batches
        model = self._ungated()
        importance: Importance = build(self.node.importance)
        progress.say("ranking the units")
        calibration = CalibrationData(refit_on, work.adapter.outputs, work.cfg.distill.chunk)
        self.importance |= rank_units(
            importance, self._placed(self.student), model, groups=work.gated_groups, calibration=calibration
        )
        self.divergence = OutputDivergence(
            self._placed(self.student),
            self._placed(self.teacher),
            model=model,
            refit_on=refit_on if self.node.reconstruct else [],
            compare_on=compare_on,
            distillation=Distillation(
                KDConfig(temperature=1.0), outputs=work.adapter.outputs, chunk=work.cfg.distill.chunk
            ),
        )
        self.sensitivity = measure_sensitivity(
            self.divergence,
            work.groups,
            work.policy,
            self.importance,
            points=self.node.points,
            on_group=lambda name: progress.say(f"measured the sensitivity of {name}"),
        )
        by_sensitivity = SensitivityObjective(self.importance, self.sensitivity, self.divergence)
        self.objectives = [by_sensitivity, *self.objectives]

    def _ungated(self) -> nn.Module:
        """The student's model, whose weights may have been trained along, without its gates."""
        return self._placed(copy.deepcopy(self.student).detach())

    def _placed(self, model: Any) -> Any:
        """A copy that may be changed, on the device where models train."""
        return copy.deepcopy(model).to(self.work.accelerator.device).eval()
