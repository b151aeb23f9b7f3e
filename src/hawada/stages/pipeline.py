"""Runs one stage, or all of them in order, skipping what is finished."""

from __future__ import annotations

import importlib
from typing import Any

from rich.markup import escape

from hawada.core.profiler import Interval
from hawada.report.progress import console
from hawada.run import Run, write_json
from hawada.stages.plan import PLANS, order
from hawada.stages.workspace import Workspace


def check(stages: list[str], run: Run) -> None:
    """Check the group filter on the bare architecture, and that the teacher can be had, before any work is done.

    Raises:
        ValueError: when the filter matches nothing, or the weights are neither here nor within reach.
    """
    work = Workspace(run.settings("train"), run)
    if any("groups" in PLANS[stage].reads for stage in stages):
        work.gated_groups  # noqa: B018
    if not work.cfg.model.pretrain and any(PLANS[stage].teacher for stage in stages):
        work.adapter.check_teacher()


def run_stage(stage: str, run: Run) -> dict[str, Any]:
    """Run one stage unless it is finished with this configuration, or the budget needs no training."""
    run.check_upstream(stage)
    if run.check(stage):
        console.print(f"[bold]{stage:>9}[/] already done in {escape(str(run.folder(stage)))}", soft_wrap=True)
        return run.result(stage)
    if stage == "train" and (foregone := foregone_result(run)):
        return foregone
    module = importlib.import_module(f"hawada.stages.{stage}")
    return module.run(run.settings(stage), run)


def run_pipeline(run: Run) -> dict[str, Any]:
    """Everything from a teacher to a verdict; writes `result.json` beside the stages' folders."""
    result: dict[str, Any] = {}
    for stage in order(run.cfg):
        result = run_stage(stage, run)
        if stage == "profile" and (foregone := foregone_result(run)):
            result = foregone
            break
    write_json(run.root / "result.json", result)
    return result


def foregone_result(run: Run) -> dict[str, Any] | None:
    """The result when the profile alone decides: the teacher meets the budget already, or nothing can."""
    profile = run.result("profile")
    budget = Workspace(run.settings("train"), run).budget
    decided = budget.foregone(profile["teacher_ms"], Interval(**profile["fastest_ratio"]))
    if decided is None:
        return None
    verdict, reason = decided
    return {
        "verdict": verdict,
        "reason": reason,
        "target_ms": budget.ratio(profile["teacher_ms"]) * profile["teacher_ms"],
        "teacher": {"latency_ms": profile["teacher"]},
        "environment": profile["environment"],
    }
