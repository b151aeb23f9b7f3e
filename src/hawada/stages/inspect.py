"""Shows what may be removed from a model and what may not: groups, gates, and layers that keep units with the reason.

Nothing is measured; the architecture is looked at without weights, or with the gates of a finished training.
"""

from __future__ import annotations

from omegaconf import DictConfig
from torch import nn

from hawada.adapters import Shape, group_table
from hawada.core.evaluate import count_macs, count_parameters
from hawada.core.gates import Student
from hawada.core.latency import half_keep
from hawada.core.structure import ExportPolicy, summarize_kept
from hawada.experiment import Run
from hawada.experiment.results import InspectedGroup, InspectResult, KeptLayer, Shares
from hawada.report import print_inspection
from hawada.stages.export import load_student
from hawada.workspace import Subject, open_stage


def run(cfg: DictConfig, run: Run) -> InspectResult:
    """Write `inspect/result.json` and print it; what an earlier look wrote there is replaced."""
    subject, _, store = open_stage(cfg, run)
    trained = run.is_finished("train") and not run.different_keys("train")
    student = load_student(subject, subject.adapter.skeleton()) if trained else _untrained(subject)
    groups = tuple(
        InspectedGroup(
            name=str(row["group"]),
            kind=str(row["kind"]),
            units=int(row["units"]),
            parent=str(row["parent"]),
            gated_at=tuple(str(row["gated_at"]).split(", ")),
            least=float(row["min"]),
            mean=float(row["mean"]),
            most=float(row["max"]),
            open=int(row["open"]),
        )
        for row in group_table(student)
    )
    student.detach()
    params, macs, half = _half(subject)
    result = InspectResult(
        summary=f"{len(groups)} groups; half of every width leaves {half.params:.0%} of the parameters and "
        f"{half.macs:.0%} of the multiply-accumulates",
        params=params,
        macs=macs,
        trained=trained,
        groups=groups,
        kept_whole=tuple(
            KeptLayer(module=kept.module, kind=kept.kind, units=kept.units, reason=kept.reason, remedy=kept.remedy)
            for kept in subject.kept_whole
        ),
        half=half,
    )
    with store.writing("inspect"):
        run.finish("inspect", result)
    print_inspection(result, summarize_kept(subject.kept_whole))
    return result


def _untrained(subject: Subject) -> Student:
    """A student of a model without numbers, whose gates have some."""
    student = Student(subject.meta, subject.gated_groups, subject.new_gate)
    student.gates = nn.ModuleList([subject.new_gate(group.units) for group in student.groups])
    return student


def _half(subject: Subject) -> tuple[int, int, Shares]:
    """Count parameters and multiply-accumulates, and the shares of both that half of every width leaves."""
    inputs = subject.adapter.example_inputs(Shape(1, "forward", 32))
    policy = ExportPolicy(uniform=subject.cfg.export.layout == "uniform")
    slim = subject.slim(subject.meta, half_keep(subject.groups, policy))
    raw = subject.adapter.raw
    params, macs = count_parameters(subject.meta), count_macs(raw(subject.meta), inputs)
    left = Shares(params=count_parameters(slim) / params, macs=count_macs(raw(slim), inputs) / max(1, macs))
    return params, macs, left
