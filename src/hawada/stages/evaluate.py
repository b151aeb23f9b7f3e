"""Verifies the slim model: fresh latency beside the teacher, quality on test data, a reload in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.markup import escape
from safetensors.torch import load_file, save_file
from torch import nn

from hawada.core.evaluate import compare_outputs, count_macs, count_parameters, score
from hawada.core.files import is_signed
from hawada.core.latency import Comparison, Interval, MeasurementError, source_of
from hawada.experiment import Run, write_json, write_text
from hawada.report import Progress, console, model_card
from hawada.stages.export import EQUALITY
from hawada.workspace import (
    Verification,
    Workspace,
    as_dict as verification_record,
    verify_here,
    verify_in_fresh_process,
)

RELOAD = """
import pathlib, sys, torch
from safetensors.torch import load_file, save_file
from hawada.adapters.base import load_with_adapter
folder, inputs, output, threads, *trust = sys.argv[1:]
torch.set_num_threads(int(threads))
adapter, model = load_with_adapter(pathlib.Path(folder), trust=trust)
given = load_file(inputs)
with torch.no_grad():
    said = adapter.logits(model(*(given[name] for name in sorted(given))))
    save_file({"logits": said.contiguous()}, output)
"""


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Write the figures that `outputs/<name>/result.json` promises, and a card beside the slim model."""
    work = Workspace(cfg, run)
    models = {"teacher": work.teacher(), "slim": work.saved_model("finetune", "slim")}
    paths = {"teacher": run.folder("export") / "teacher", "slim": run.folder("finetune") / "slim"}
    with work.writing("evaluate") as folder, Progress("evaluate", 3) as progress:
        progress.say("reloading in a fresh process")
        with tempfile.TemporaryDirectory() as scratch:
            reloaded = prove_reload(work, paths["slim"], run.folder("finetune") / "answers.safetensors", Path(scratch))
        progress.step("scoring")
        quality = score_models(work, models)
        progress.step("measuring")
        verification = measure_for_verdict(work, models, paths, folder)
        comparison = verification.or_else(Comparison.from_dict(run.result("export")["measured"]))
        phases = {work.shape.phase: comparison}
        if verification.failed is None and comparison.source != "table":
            phases |= measure_other_phases(work, models)
        progress.step("")
        result = {
            **decide(work, comparison, verification.every),
            **quality,
            "phases": {name: _phase(c) for name, c in phases.items()},
        }
        latency = {"teacher": comparison.baseline, "slim": comparison.candidate}
        for name, path in paths.items():
            result[name] |= {"latency_ms": _short(latency[name]) | {"p95": latency[name].p95}}
            result[name] |= {"path": work.absolute(path)}
        result["slim"]["loads_with"] = work.adapter.loads_with(result["slim"]["path"], models["slim"])
        result |= {
            "kd": run.result("train").get("kd"),
            "proxy": run.result("profile")["fidelity"],
            "equivalence": run.result("export")["equivalence"] | {"reload": reloaded},
            "environment": work.environment(),
            "measured": comparison.as_dict(),
            "verification": {name: _short(repeat.ratio) for name, repeat in verification.measured.items()},
        }
        example = work.adapter.loads_with("path/to/it", models["slim"])
        card = model_card(result, name=run.root.name, base=cfg.model.get("path"), loads_with=example)
        write_card(paths["slim"] / "README.md", card)
        return run.finish("evaluate", result)


def write_card(path: Path, card: str) -> None:
    """Write the card that the hub shows, unless somebody wrote one of their own; finetune's manifest lists neither."""
    if os.path.lexists(path) and (path.is_symlink() or not is_signed(path)):
        console.print(f"{escape(str(path))} is not this program's own and is left as it is", soft_wrap=True)
        return
    write_text(path, card)


def score_models(work: Workspace, models: dict[str, nn.Module]) -> dict[str, Any]:
    """Quality on test data and costs of each model, and how often their answers agree."""
    loader, metric = work.data.test_loader(work.cfg.evaluate.batch_size), work.data.metric
    one = replace(work.shape, batch=1)
    scores = {name: score(work.placed(model), loader, work.adapter.logits) for name, model in models.items()}
    agreement = float((scores["teacher"].predicted == scores["slim"].predicted).float().mean())
    return {
        "metric": metric,
        "agreement": agreement,
        **{
            name: {
                "params": count_parameters(model),
                "macs": count_macs(work.adapter.workload(model, one), work.inputs(one)),
                metric: getattr(scores[name], metric),
            }
            for name, model in models.items()
        },
    }


def decide(work: Workspace, comparison: Comparison, every: Comparison | None = None) -> dict[str, Any]:
    """The verdict on a fresh measurement, with what it was measured against.

    Args:
        work: of the stage that verifies.
        comparison: of the rounds that count.
        every: of all rounds; None when that is the same.
    """
    verdict, reason = work.budget.verdict(comparison, every)
    if verdict == "unverified" and comparison.source == "measured" and work.budget.has_target:
        reason = f"{reason}; {remedy(work)}"
    ratio = work.budget.ratio(comparison.baseline.median) if work.budget.has_target else None
    return {
        "summary": f"{verdict}: {reason}",
        "verdict": verdict,
        "reason": reason,
        "target_ms": None if ratio is None else ratio * comparison.baseline.median,
        "target_ratio": ratio,
        "timed_as": work.timed_as,
        "latency_ratio": _short(comparison.ratio),
    }


def remedy(work: Workspace) -> str:
    """What helps when the figures do not decide."""
    seconds = 3 * work.cfg.measure.max_seconds
    longer = f"stage=evaluate measure.max_seconds={seconds:g} overwrite=true"
    text = f"the same command measures again, and {longer} for longer"
    if work.device.type == "cpu" and torch.get_num_threads() > 1:
        text += "; runtime.threads=1 (with another name=...) leaves no threads that wait for each other"
    return text


def measure_for_verdict(
    work: Workspace, models: Mapping[str, nn.Module], paths: Mapping[str, Path], folder: Path
) -> Verification:
    """A fresh comparison of teacher and slim model: of the saved ones in a process of their own, if time is taken."""
    if work.cfg.gpu.timing == "table":
        return Verification(Comparison.from_dict(work.run.result("export")["measured"]))
    if source_of(work.clock) == "measured":
        for model in models.values():
            model.cpu()  # the device is left to the other process
        return verify_in_fresh_process(work, paths["teacher"], paths["slim"], folder)
    verification = verify_here(work, models["teacher"], models["slim"])
    write_json(folder / "verification.json", verification_record(verification))
    return verification


def measure_other_phases(work: Workspace, models: Mapping[str, nn.Module]) -> dict[str, Comparison]:
    """The latency of phases that the target is not on; one that cannot be measured is left out."""
    shapes = [replace(work.shape, phase=name) for name in work.adapter.phases[:2] if name != work.shape.phase]
    measured = {}
    for shape in shapes:
        teacher, slim = (work.timed(models[name], shape) for name in ("teacher", "slim"))
        with suppress(MeasurementError, torch.AcceleratorError):
            measured[shape.phase] = work.compare(teacher, slim, shape=shape)
    return measured


def prove_reload(work: Workspace, path: Path, answers: Path, scratch: Path) -> dict[str, Any]:
    """Difference between what the finetuned model said before it was saved and what its files say in a new process.

    The process loads the files with stock tools and cannot import this package, where the format allows it. A language
    model must also generate the same tokens.

    Raises:
        RuntimeError: when the process fails, the logits differ by more than `EQUALITY`, or the tokens differ.
    """
    inputs, output = scratch / "reload_inputs.safetensors", scratch / "reload_output.safetensors"
    save_file({f"{index:03d}": x for index, x in enumerate(work.check_inputs())}, inputs)
    command = [sys.executable, "-c", work.adapter.stock_reload or RELOAD]
    command += [str(path.resolve()), str(inputs.resolve()), str(output.resolve()), str(torch.get_num_threads())]
    if work.adapter.stock_reload is None:
        command += work.trust
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{path} does not load in a fresh process: {said[-1]}")
    before, after = load_file(answers), load_file(output)
    record: dict[str, Any] = compare_outputs(before["logits"], after["logits"])
    if not record["max_abs_diff"] <= EQUALITY * record["max_abs_logit"]:
        raise RuntimeError(f"{path} computes something else after reloading: {record['max_abs_diff']:.3g}")
    record["stock"] = work.adapter.stock_reload is not None
    if "tokens" in before:
        record["same_tokens"] = bool((before["tokens"] == after["tokens"]).all())
        if not record["same_tokens"]:
            raise RuntimeError(f"{path} generates other tokens after reloading")
    return record


def _phase(comparison: Comparison) -> dict[str, Any]:
    return {
        "teacher_ms": _short(comparison.baseline),
        "slim_ms": _short(comparison.candidate),
        "ratio": _short(comparison.ratio),
    }


def _short(interval: Interval) -> dict[str, float]:
    return {"median": interval.median, "low": interval.low, "high": interval.high}
