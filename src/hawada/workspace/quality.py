"""What the export knows of quality: which units go first, what widths are worth, and how to make up for what goes."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from hawada.config import build
from hawada.core.distill import Distillation, KDConfig
from hawada.core.finetune import recalibrate_batchnorm
from hawada.core.gates import Student
from hawada.core.importance import AnswerLoss, CalibrationData, Importance, Sensitivity, measure_sensitivity, rank_units
from hawada.core.reconstruction import compensate
from hawada.core.search import Worths, saliency_from_gates
from hawada.core.structure import Keep
from hawada.report import Progress
from hawada.workspace.workspace import Workspace


class Quality:
    """As configured under `export` and `calibration`, from the gates and training data, which are read when it is made.

    Half of the data is for refitting layers while worths are measured, the other half for comparing answers.

    Args:
        work: of the stage.
        student: the gated model; not changed.
        teacher: the original.
        progress: told what is going on.

    Attributes:
        gates: saliency by gated group, (units,), larger is kept longer.
        saliency: the same, or the importance that was asked for.
        sensitivity: what each width costs; None where the saliency tells.
        loss: of a whole choice of units, in nats per answer; None likewise.
    """

    def __init__(self, work: Workspace, student: Student, teacher: nn.Module, progress: Progress) -> None:
        self.work, self.node, samples = work, work.cfg.export, work.cfg.calibration.samples
        self.student, self.teacher = student, teacher
        self.gates = saliency_from_gates(student.effective_gates())
        self.saliency: dict[str, Tensor] = dict(self.gates)
        self.sensitivity: Sensitivity | None = None
        self.loss: AnswerLoss | None = None
        self.batches: list[Any] = []
        measured = self.node.sensitivity == "measured" and self.node.widths == "allocation" and work.budget.has_target
        if not samples or not (measured or self.node.reconstruct):
            return
        size = min(work.cfg.calibration.batch_size, max(samples // 2, 1))
        batches = list(work.data.calibration_loader(size, samples))
        self.batches = [batch for batch in batches if len(batch[0]) > 1] or batches  # BatchNorm needs more than one
        if measured:
            self._measure(progress)

    @property
    def worths(self) -> Worths | None:
        """What a width is worth; None where the saliency tells."""
        return None if self.sensitivity is None else self.sensitivity.worth

    def compensated(self, slim: nn.Module, keep: Keep) -> tuple[nn.Module, dict[str, Any]]:
        """The slim model with refitted weights and BatchNorm statistics of its own, if that is better.

        Args:
            slim: what slicing alone made.
            keep: what it was sliced to.

        Returns:
            The better of the two models, and for the record: how many layers were `refitted`, and the nats per answer
            that slicing alone and slicing with a refit cost, where such were measured.
        """
        if not self.node.reconstruct or not self.batches:
            return slim, {"refitted": 0}
        nats: dict[str, Any] = {}
        if self.loss is not None:
            nats = {"nats": {"sliced": self.loss.without_refit(keep), "refitted": self.loss(keep)}}
            if nats["nats"]["refitted"] > nats["nats"]["sliced"]:
                return slim, {"refitted": 0, **nats}
        student = self._placed(self.student)
        layers = compensate(student, self._ungated(), {g.name: keep[g.name] for g in student.groups}, self.batches)
        refitted = self.work.slim(student.model, keep)
        recalibrate_batchnorm(refitted, self.batches)
        return refitted.cpu(), {"refitted": len(layers), **nats}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {} if self.sensitivity is None else {"sensitivity": self.sensitivity.as_dict()}

    def _measure(self, progress: Progress) -> None:
        """Order and worth of the units."""
        work, half = self.work, max(1, len(self.batches) // 2)
        fitted, judged = self.batches[:half], self.batches[half:] or self.batches
        model = self._ungated()
        importance: Importance = build(self.node.importance)
        progress.say("ranking the units")
        calibration = CalibrationData(fitted, work.adapter.outputs, work.cfg.distill.chunk)
        self.saliency |= rank_units(
            importance, self._placed(self.student), model, groups=work.gated_groups, calibration=calibration
        )
        self.loss = AnswerLoss(
            self._placed(self.student),
            self._placed(self.teacher),
            model=model,
            fitted=fitted if self.node.reconstruct else [],
            judged=judged,
            distillation=Distillation(
                KDConfig(temperature=1.0), reader=work.adapter.outputs, chunk=work.cfg.distill.chunk
            ),
        )
        self.sensitivity = measure_sensitivity(
            self.loss,
            work.groups,
            work.policy,
            self.saliency,
            points=self.node.points,
            on_group=lambda name: progress.say(f"measured what {name} is worth"),
        )

    def _ungated(self) -> nn.Module:
        """The student's model, whose weights may have been trained along, without its gates."""
        return self._placed(copy.deepcopy(self.student).detach())

    def _placed(self, model: Any) -> Any:
        """A copy that may be changed, on the device where models train."""
        return copy.deepcopy(model).to(self.work.accelerator.device).eval()
