"""Runs one stage, or all of them in order, skipping what is finished."""

from __future__ import annotations

import importlib
from typing import Any

from omegaconf import DictConfig

from hawada.report.progress import console
from hawada.report.table import print_result
from hawada.run import Run, write_json
from hawada.stages.plan import order
from hawada.stages.workspace import Workspace


def run_stage(stage: str, run: Run) -> dict[str, Any]:
    """Run one stage unless it is finished with this configuration; returns its result."""
    if run.check(stage):
        console.print(f"[bold]{stage:>9}[/] already done in {run.folder(stage)}")
        return run.result(stage)
    run.check_upstream(stage)
    module = importlib.import_module(f"hawada.stages.{stage}")
    return module.run(run.settings(stage), run)


def run_pipeline(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Everything from a teacher to a verdict; writes `result.json` beside the stages' folders."""
    result: dict[str, Any] = {}
    for stage in order(cfg):
        result = run_stage(stage, run)
        if "verdict" in result and stage == "train":  # the profile alone decided: nothing is trained
            profile = run.result("profile")
            result = result | {"teacher": {"latency_ms": profile["teacher"]}, "environment": profile["environment"]}
            break
    write_json(run.root / "result.json", result)
    print_result(result, run.root)
    return result


def check_groups(run: Run) -> None:
    """Check the group filter on the bare architecture, before any weights are loaded.

    Raises:
        ValueError: when it matches nothing.
    """
    Workspace(run.settings("train"), run).gated_groups  # noqa: B018
