"""What the export knows of quality: importance of units, sensitivity to widths, and reconstruction."""

from __future__ import annotations

import copy
from dataclasses import dataclass
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
from hawada.core.search import ImportanceObjective, SearchObjective, SensitivityObjective
from hawada.core.structure import Keep
from hawada.experiment.results import Divergences, Sensitivities
from hawada.report import Progress
from hawada.workspace.subject import Subject


@dataclass(frozen=True)
class ReconstructionOutcome:
    """What came of reconstructing a slim model.

    Attributes:
        refitted: how many layers were reconstructed; 0 where slicing alone is better.
        nats: output divergence without and with reconstruction, or None where that was not measured.
    """

    refitted: int
    nats: Divergences | None = None


class Quality:
    """As configured under `export` and `calibration`, from the gates and training data, which are read when it is made.

    Half of the data is for refitting layers while the sensitivity is measured, the other half for comparing outputs.

    Args:
        subject: what is exported.
        student: the gated model; not changed.
        teacher: the original.
        progress: told what is going on.
        has_target: whether widths are chosen for a latency.

    Attributes:
        importance: by gated group, (units,), larger is kept longer.
        sensitivity: the output divergence of each width; None where importance decides.
        divergence: of a whole choice of units, in nats per sample or token; None likewise.
        objectives: what the search goes by, and others that propose widths to it.
    """

    def __init__(
        self, subject: Subject, student: Student, teacher: nn.Module, progress: Progress, *, has_target: bool
    ) -> None:
        self.subject, self.node, samples = subject, subject.cfg.export, subject.cfg.calibration.samples
        self.student, self.teacher = student, teacher
        gates = importance_from_gates(student.effective_gates())
        self.importance: dict[str, Tensor] = dict(gates)
        self.sensitivity: Sensitivity | None = None
        self.divergence: OutputDivergence | None = None
        self.objectives: list[SearchObjective] = [ImportanceObjective(subject.groups, gates)]
        self.batches: list[Any] = []
        measured = self.node.sensitivity == "measured" and self.node.widths == "allocation" and has_target
        if not samples or not (measured or self.node.reconstruct):
            return
        size = min(subject.cfg.calibration.batch_size, max(samples // 2, 1))
        batches = list(subject.data.calibration_loader(size, samples))
        self.batches = [batch for batch in batches if len(batch[0]) > 1] or batches  # BatchNorm needs more than one
        if measured:
            self._measure(progress)

    def reconstructed(self, slim: nn.Module, keep: Keep) -> tuple[nn.Module, ReconstructionOutcome]:
        """The slim model with refitted weights and BatchNorm statistics of its own, if that is better.

        Args:
            slim: what slicing alone made.
            keep: what it was sliced to.

        Returns:
            The better of the two models, and what came of reconstruction.
        """
        if not self.node.reconstruct or not self.batches:
            return slim, ReconstructionOutcome(0)
        nats = None
        if self.divergence is not None:
            alone = self.divergence.without_reconstruction(keep)
            nats = Divergences(sliced=alone, refitted=self.divergence(keep))
            if nats.refitted > nats.sliced:
                return slim, ReconstructionOutcome(0, nats)
        student = self._placed(self.student)
        layers = reconstruct(student, self._ungated(), {g.name: keep[g.name] for g in student.groups}, self.batches)
        refitted = self.subject.slim(student.model, keep)
        recalibrate_batchnorm(refitted, self.batches)
        return refitted.cpu(), ReconstructionOutcome(len(layers), nats)

    @property
    def sensitivities(self) -> Sensitivities | None:
        """The output divergence of each width, as results hold it; None where that was not measured."""
        return None if self.sensitivity is None else self.sensitivity.as_dict()

    def _measure(self, progress: Progress) -> None:
        """Importance, and sensitivity."""
        subject, half = self.subject, max(1, len(self.batches) // 2)
        refit_on, compare_on = self.batches[:half], self.batches[half:] or self.batches
        model = self._ungated()
        importance: Importance = build(self.node.importance)
        progress.say("ranking the units")
        calibration = CalibrationData(refit_on, subject.outputs, subject.cfg.distill.chunk, subject.task)
        self.importance |= rank_units(
            importance, self._placed(self.student), model, groups=subject.gated_groups, calibration=calibration
        )
        self.divergence = OutputDivergence(
            self._placed(self.student),
            self._placed(self.teacher),
            model=model,
            refit_on=refit_on if self.node.reconstruct else [],
            compare_on=compare_on,
            distillation=Distillation(
                KDConfig(temperature=1.0),
                outputs=subject.outputs,
                chunk=subject.cfg.distill.chunk,
                task=subject.task,
            ),
        )
        self.sensitivity = measure_sensitivity(
            self.divergence,
            subject.groups,
            subject.policy,
            self.importance,
            points=self.node.points,
            on_group=lambda name: progress.say(f"measured the sensitivity of {name}"),
        )
        by_sensitivity = SensitivityObjective(self.importance, self.sensitivity, self.divergence)
        self.objectives = [by_sensitivity, *self.objectives]

    def _ungated(self) -> nn.Module:
        """The student's model, whose weights may have been trained along, without its gates."""
        ungated: nn.Module = self._placed(copy.deepcopy(self.student).detach())
        return ungated

    def _placed(self, model: Any) -> Any:
        """A copy that may be changed, on the device where models train."""
        return copy.deepcopy(model).to(self.subject.accelerator.device).eval()
