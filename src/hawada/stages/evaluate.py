"""Verifies the slim model: fresh latency beside the teacher, quality on test data, a reload in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.markup import escape
from safetensors.torch import load_file, save_file
from torch import nn

from hawada.core.evaluate import compare_outputs, count_macs, count_parameters
from hawada.core.files import is_signed, write_json, write_text
from hawada.core.latency import MeasurementError, source_of
from hawada.core.task import Scores
from hawada.core.verdict import Comparison, Latency, Verdict
from hawada.experiment import Run
from hawada.experiment.results import (
    QUALITIES,
    Equivalence,
    EvaluateResult,
    ModelFigures,
    ModelLatency,
    PhaseLatency,
    Reload,
    SlimFigures,
    TimedAs,
)
from hawada.report import Progress, console, model_card
from hawada.stages.export import MAX_RELATIVE_DIFFERENCE
from hawada.workspace import (
    ModelStopwatch,
    Subject,
    Verification,
    as_dict as verification_record,
    open_stage,
    verify_here,
    verify_in_fresh_process,
)

RELOAD = """
import pathlib, sys, torch
from safetensors.torch import load_file, save_file
from hawada.adapters import load_with_adapter
folder, inputs, output, threads, *trust = sys.argv[1:]
torch.set_num_threads(int(threads))
adapter, model = load_with_adapter(pathlib.Path(folder), trust=trust)
given = load_file(inputs)
with torch.no_grad():
    logits = adapter.logits(adapter.raw(model)(*(given[name] for name in sorted(given))))
    save_file({"logits": logits.contiguous()}, output)
"""


def run(cfg: DictConfig, run: Run) -> EvaluateResult:
    """Write the figures that `outputs/<name>/result.json` promises, and a card beside the slim model."""
    subject, watch, store = open_stage(cfg, run)
    models = {"teacher": subject.teacher(), "slim": subject.saved_model("finetune", "slim")}
    paths = {"teacher": run.folder("export") / "teacher", "slim": run.folder("finetune") / "slim"}
    with store.writing("evaluate") as folder, Progress("evaluate", 3) as progress:
        progress.say("reloading in a fresh process")
        with tempfile.TemporaryDirectory() as scratch:
            reloaded = prove_reload(
                subject, paths["slim"], run.folder("finetune") / "check_outputs.safetensors", Path(scratch)
            )
        progress.step("scoring")
        scores = score_models(watch, models)
        progress.step("measuring")
        verification = measure_for_verdict(watch, models, paths, folder)
        comparison = verification.or_else(run.result("export").measured)
        phases = {watch.shape.phase: comparison}
        if verification.failed is None and comparison.source != "table":
            phases |= measure_other_phases(watch, models)
        progress.step("")
        decision = decide(watch, comparison, verification.every, run.result("export").measured)
        place = str(paths["slim"].resolve())
        metric = subject.task.metric(subject.data.metric, bool(scores["teacher"].figures))
        own: list[dict[str, Any]] = [
            {metric if metric in QUALITIES else "score": quality}
            for quality in subject.task.qualities(metric, scores["teacher"], scores["slim"])
        ]
        export = run.result("export")
        result = EvaluateResult(
            summary=f"{decision.verdict}: {decision.reason}",
            verdict=decision.verdict,
            reason=decision.reason,
            target_ms=decision.target_ms,
            target_ratio=decision.target_ratio,
            timed_as=TimedAs(**watch.timed_as),
            latency_ratio=comparison.ratio,
            metric=metric,
            agreement=subject.task.agreement(scores["teacher"], scores["slim"]),
            teacher=ModelFigures(
                **costs(watch, models["teacher"]),
                **own[0],
                latency_ms=_without_samples(comparison.baseline),
                path=str(paths["teacher"].resolve()),
            ),
            slim=SlimFigures(
                **costs(watch, models["slim"]),
                **own[1],
                latency_ms=_without_samples(comparison.candidate),
                path=place,
                loads_with=subject.adapter.loads_with(place, models["slim"]),
            ),
            phases={name: _phase(measured) for name, measured in phases.items()},
            kd=run.result("train").kd,
            proxy=run.result("profile").fidelity,
            equivalence=Equivalence(
                max_abs_diff=export.equivalence.max_abs_diff,
                max_abs_logit=export.equivalence.max_abs_logit,
                reload=reloaded,
            ),
            environment=store.environment,
            measured=comparison,
            verification={name: repeat.ratio for name, repeat in verification.measured.items()},
        )
        example = subject.adapter.loads_with("path/to/it", models["slim"])
        card = model_card(result, name=run.root.name, base=cfg.model.get("path"), loads_with=example)
        write_card(paths["slim"] / "README.md", card)
        return run.finish("evaluate", result)


def write_card(path: Path, card: str) -> None:
    """Write the card that the hub shows, unless somebody wrote one of their own; finetune's manifest lists neither."""
    if os.path.lexists(path) and (path.is_symlink() or not is_signed(path)):
        console.print(f"{escape(str(path))} is not this program's own and is left as it is", soft_wrap=True)
        return
    write_text(path, card)


def score_models(watch: ModelStopwatch, models: Mapping[str, nn.Module]) -> dict[str, Scores]:
    """Quality of each model on test data."""
    subject = watch.subject
    loader = subject.data.test_loader(subject.cfg.evaluate.batch_size)
    return {name: subject.task.score(watch.placed(model), loader, subject.pick) for name, model in models.items()}


def costs(watch: ModelStopwatch, model: nn.Module) -> dict[str, int]:
    """Parameters, and multiply-accumulates of one call with a batch of 1."""
    one = replace(watch.shape, batch=1)
    macs = count_macs(watch.subject.adapter.workload(watch.subject.adapter.raw(model), one), watch.inputs(one))
    return {"params": count_parameters(model), "macs": macs}


@dataclass(frozen=True)
class Decision:
    """The verdict on a fresh measurement, with what it was measured against.

    Attributes:
        verdict: whether the target was met.
        reason: the figures behind it, and what helps where they do not decide.
        target_ms: milliseconds that were asked for; None without a target.
        target_ratio: the same as a fraction of the teacher's time.
    """

    verdict: Verdict
    reason: str
    target_ms: float | None
    target_ratio: float | None


def decide(
    watch: ModelStopwatch, comparison: Comparison, every: Comparison | None = None, earlier: Comparison | None = None
) -> Decision:
    """Compare a fresh measurement with the target.

    Args:
        watch: by which the stage measures.
        comparison: of the rounds that count.
        every: of all rounds; None when that is the same.
        earlier: what the search measured of the chosen model; None when that is not known.
    """
    verdict, reason = watch.budget.verdict(comparison, every, earlier)
    if verdict is Verdict.UNVERIFIED and comparison.source == "measured" and watch.budget.has_target:
        reason = f"{reason}; {remedy(watch)}"
    ratio = watch.budget.ratio(comparison.baseline.median) if watch.budget.has_target else None
    return Decision(verdict, reason, None if ratio is None else ratio * comparison.baseline.median, ratio)


def remedy(watch: ModelStopwatch) -> str:
    """What helps when the figures do not decide."""
    seconds = 3 * watch.cfg.measure.max_seconds
    longer = f"stage=evaluate measure.max_seconds={seconds:g} overwrite=true"
    text = f"the same command measures again, and {longer} for longer"
    if watch.device.type == "cpu" and torch.get_num_threads() > 1:
        text += "; runtime.threads=1 (with another name=...) leaves no threads that wait for each other"
    return text


def measure_for_verdict(
    watch: ModelStopwatch, models: Mapping[str, nn.Module], paths: Mapping[str, Path], folder: Path
) -> Verification:
    """A fresh comparison of teacher and slim model: of the saved ones in a process of their own, if time is taken."""
    if watch.cfg.gpu.timing == "table":
        return Verification(watch.store.run.result("export").measured)
    if source_of(watch.clock) == "measured":
        for model in models.values():
            model.cpu()  # the device is left to the other process
        return verify_in_fresh_process(watch, paths["teacher"], paths["slim"], folder)
    verification = verify_here(watch, models["teacher"], models["slim"])
    write_json(folder / "verification.json", verification_record(verification))
    return verification


def measure_other_phases(watch: ModelStopwatch, models: Mapping[str, nn.Module]) -> dict[str, Comparison]:
    """The latency of phases that the target is not on; one that cannot be measured is left out."""
    shapes = [
        replace(watch.shape, phase=name) for name in watch.subject.adapter.phases[:2] if name != watch.shape.phase
    ]
    measured = {}
    for shape in shapes:
        teacher, slim = (watch.timed(models[name], shape) for name in ("teacher", "slim"))
        with suppress(MeasurementError, torch.AcceleratorError):
            measured[shape.phase] = watch.compare(teacher, slim, watch.inputs(shape))
    return measured


def prove_reload(subject: Subject, path: Path, outputs: Path, scratch: Path) -> Reload:
    """Difference between the outputs of the finetuned model in memory and of its files in a new process.

    The process loads the files with stock tools and cannot import this package, where the format allows it. A language
    model must also generate the same tokens.

    Raises:
        RuntimeError: when the process fails, the logits differ by more than `MAX_RELATIVE_DIFFERENCE`, or the tokens
            differ.
    """
    inputs, output = scratch / "reload_inputs.safetensors", scratch / "reload_output.safetensors"
    save_file({f"{index:03d}": x for index, x in enumerate(subject.check_inputs())}, inputs)
    command = [sys.executable, "-c", subject.adapter.stock_reload or RELOAD]
    command += [str(path.resolve()), str(inputs.resolve()), str(output.resolve()), str(torch.get_num_threads())]
    if subject.adapter.stock_reload is None:
        command += subject.trust
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{path} does not load in a fresh process: {reason[-1]}")
    before, after = load_file(outputs), load_file(output)
    difference = compare_outputs(before["logits"], after["logits"])
    same_tokens = bool((before["tokens"] == after["tokens"]).all()) if "tokens" in before else None
    found = Reload(**difference, stock=subject.adapter.stock_reload is not None, same_tokens=same_tokens)
    if not found.max_abs_diff <= MAX_RELATIVE_DIFFERENCE * found.max_abs_logit:
        raise RuntimeError(f"{path} computes something else after reloading: {found.max_abs_diff:.3g}")
    if same_tokens is False:
        raise RuntimeError(f"{path} generates other tokens after reloading")
    return found


def _phase(comparison: Comparison) -> PhaseLatency:
    return PhaseLatency(teacher_ms=comparison.baseline, slim_ms=comparison.candidate, ratio=comparison.ratio)


def _without_samples(latency: Latency) -> ModelLatency:
    return ModelLatency(median=latency.median, low=latency.low, high=latency.high, p95=latency.p95)
