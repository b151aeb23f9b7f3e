"""Judges the slim model: fresh latency beside the teacher, quality on test data, a reload in a new process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import nn

from hawada.core.evaluate import compare_outputs, count_macs, count_parameters, predict_classes
from hawada.core.profiler import Comparison, Interval
from hawada.report.progress import Progress
from hawada.run import Run
from hawada.stages.export import EQUALITY
from hawada.stages.workspace import Workspace

RELOAD = """
import pathlib, sys, torch
from safetensors.torch import load_file, save_file
from hawada.adapters.base import load_with_adapter
torch.set_num_threads(int(sys.argv[4]))
adapter, model = load_with_adapter(pathlib.Path(sys.argv[1]), trust=[sys.argv[5]])
inputs = load_file(sys.argv[2])
with torch.no_grad():
    output = adapter.logits(model(*(inputs[name] for name in sorted(inputs))))
    save_file({"logits": output.contiguous()}, sys.argv[3])
"""


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Write the figures that `outputs/<name>/result.json` promises."""
    work = Workspace(cfg, run)
    teacher, slim = work.teacher(), work.saved_model("finetune", "slim")
    slim_path, teacher_path = run.folder("finetune") / "slim", run.folder("export") / "teacher"
    with work.writing("evaluate") as folder, Progress("evaluate", 3) as progress:
        progress.say("reloading in a fresh process")
        reloaded = prove_reload(work, slim, slim_path, folder)
        progress.step("scoring")
        models = {"teacher": teacher, "slim": slim}
        loader = work.data.test_loader(cfg.evaluate.batch_size)
        predicted, accuracy = {}, {}
        for name, model in models.items():
            predicted[name], labels = predict_classes(work.timed(model), loader, work.adapter.logits)
            accuracy[name] = float((predicted[name] == labels).float().mean())
        costs = {
            name: {"params": count_parameters(model), "macs": count_macs(model, tuple(x[:1] for x in work.inputs))}
            for name, model in models.items()
        }
        progress.step("measuring")
        comparison = measure_until_clear(work, teacher, slim)
        progress.step("")
        verdict, reason = work.budget.verdict(comparison)
        teacher_ms = comparison.baseline.median
        paths = {"teacher": teacher_path, "slim": slim_path}
        latency = {"teacher": comparison.baseline, "slim": comparison.candidate}
        return run.finish(
            "evaluate",
            {
                "summary": f"{verdict}: {reason}",
                "verdict": verdict,
                "reason": reason,
                "target_ms": work.budget.ratio(teacher_ms) * teacher_ms if work.budget.has_target else None,
                "target_ratio": work.budget.ratio(teacher_ms) if work.budget.has_target else None,
                "timed_as": work.timed_as,
                "latency_ratio": _short(comparison.ratio),
                **{
                    name: {
                        "latency_ms": _short(latency[name]) | {"p95": latency[name].p95},
                        **costs[name],
                        "accuracy": accuracy[name],
                        "path": work.absolute(paths[name]),
                    }
                    for name in models
                },
                "agreement": float((predicted["teacher"] == predicted["slim"]).float().mean()),
                "kd": run.result("train").get("kd"),
                "proxy": run.result("profile")["fidelity"],
                "equivalence": run.result("export")["equivalence"] | {"reload": reloaded},
                "environment": work.environment(),
                "measured": asdict(comparison),
            },
        )


def measure_until_clear(work: Workspace, teacher: nn.Module, slim: nn.Module) -> Comparison:
    """A fresh comparison; when its interval straddles the target, once more and for longer."""
    comparison = work.compare(teacher, slim)
    if work.budget.has_target and work.budget.verdict(comparison)[0] == "unverified":
        rounds = work.rounds
        longer = replace(
            rounds,
            precision=rounds.precision / 4,
            max_rounds=rounds.max_rounds * 4,
            max_seconds=rounds.max_seconds * 2,
        )
        comparison = work.compare(teacher, slim, longer)
    return comparison


def prove_reload(work: Workspace, model: nn.Module, path: Path, scratch: Path) -> dict[str, float]:
    """Difference of logits between a model in memory and its files loaded by a new process.

    Raises:
        RuntimeError: when the process fails or the logits differ by more than `EQUALITY`.
    """
    inputs, output = scratch / "reload_inputs.safetensors", scratch / "reload_output.safetensors"
    example = work.adapter.example_inputs(min(8, work.batch))
    save_file({f"{index:03d}": x for index, x in enumerate(example)}, inputs)
    target = work.adapter_spec["_target_"]
    command = [sys.executable, "-c", RELOAD, str(path), str(inputs), str(output), str(torch.get_num_threads()), target]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{path} does not load in a fresh process: {said[-1]}")
    with torch.no_grad():
        here = work.adapter.logits(model(*example))
    record = compare_outputs(here, load_file(output)["logits"])
    inputs.unlink()
    output.unlink()
    if not record["max_abs_diff"] <= EQUALITY * record["max_abs_logit"]:
        raise RuntimeError(f"{path} computes something else after reloading: {record['max_abs_diff']:.3g}")
    return record


def _short(interval: Interval) -> dict[str, float]:
    return {"median": interval.median, "low": interval.low, "high": interval.high}
