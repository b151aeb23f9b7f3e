"""Checks what stages will need, then runs one of them, or all in order, skipping what is finished."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from hawada.adapters.huggingface import hub
from hawada.core.finetune import NORMS
from hawada.core.formats import check_formats
from hawada.core.latency import SUCCESS, Interval
from hawada.experiment import PLANS, Run, order, upstream
from hawada.report import console, print_diagnosis, print_result
from hawada.stages.profile import measure_fastest
from hawada.workspace import Workspace, check_distillation

COMPUTING = ("pretrain", "train", "export", "front", "finetune")  # stages that compute in compute.mixed_precision


def check(stages: list[str], run: Run) -> None:
    """Check what can be checked before any work is done.

    The group filter matches something on the bare architecture; the
    data fit the model; the teacher's weights are here or within reach; earlier measurements are this machine's.

    Raises:
        ValueError: one sentence with the key and the remedy.
    """
    plans = [PLANS[stage] for stage in stages]
    if "publish" in stages:
        check_formats(run.cfg.export.formats)
        if run.cfg.export.push_to is not None:
            hub.check_push(run.cfg.export.push_to)
        if (
            not set(run.cfg.export.formats) <= {"hf"}
            and Workspace(run.settings("publish"), run).adapter.modality == "text"
        ):
            raise ValueError("export.formats: onnx and pt2 are for image models; leave export.formats=[hf]")
        if run.cfg.export.push == "gated" and run.cfg.train.weight_optimizer is not None:
            raise ValueError("export.push: gated goes with frozen weights; set train=gates, or export.push=slim")
    if "pretrain" in stages and not run.cfg.model.pretrain:
        raise ValueError("stage=pretrain: this model comes with weights; set model.pretrain=true to train it")
    if stages and not run.cfg.model.pretrain and any(plan.teacher for plan in plans):
        Workspace(run.settings(stages[-1]), run).adapter.check_teacher()
    for stage in stages:
        _check_training(stage, run)
    if any("groups" in plan.reads for plan in plans):
        Workspace(run.settings("train"), run).check_groups()
    if any(plan.measures for plan in plans):
        work = Workspace(run.settings("profile"), run)
        work.adapter.check_shape(work.shape)
    distilling = [plan.name for plan in plans if "distill" in plan.reads]
    if distilling:
        trains = any("kd" in plan.reads for plan in plans)
        check_distillation(Workspace(run.settings(distilling[0]), run), trains=trains)
    reading = [plan.name for plan in plans if "data" in plan.reads]
    if reading:
        Workspace(run.settings(reading[0]), run).data  # noqa: B018
    if run.cfg.gpu.timing == "measured" and any(plan.measures for plan in plans):
        _check_same_machine(stages, run)


def _check_training(stage: str, run: Run) -> None:
    """Refuse a precision that the device cannot train with, and batches that BatchNorm cannot.

    Raises:
        ValueError: naming the key.
    """
    if stage not in COMPUTING:
        return
    work = Workspace(run.settings(stage), run)
    if work.cfg.compute.mixed_precision == "fp16" and work.device.type != "cuda":
        raise ValueError(
            f"compute.mixed_precision: fp16 needs an NVIDIA GPU and models train on the {work.device.type} here; set "
            "compute.mixed_precision=no"
        )
    alone = stage in ("pretrain", "finetune") and work.cfg[stage].batch_size == 1
    if alone and any(isinstance(module, NORMS) for module in work.meta.modules()):
        raise ValueError(
            f"{stage}.batch_size: BatchNorm cannot be trained on 1 image at a time; set schedule.batch_size to 2 or "
            "more"
        )


def _check_same_machine(stages: list[str], run: Run) -> None:
    """Refuse latencies that another machine or stack measured, or with overwrite=true take them afresh."""
    here = Workspace(run.settings("profile"), run).environment()["fingerprint"]
    needed = {earlier for stage in stages for earlier in (*upstream(stage, run.cfg), stage)}
    for stage in [name for name in PLANS if name in needed and PLANS[name].measures and run.is_finished(name)]:
        there = json.loads((run.folder(stage) / "environment.json").read_text())["fingerprint"]
        different = [f"{key} {there.get(key)}" for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
        if different and run.overwrite and stage in stages:
            run.discard(stage)
        elif different:
            raise ValueError(
                f"{run.folder(stage)} was measured elsewhere ({', '.join(different)}) and latencies do not carry over; "
                "choose another name=..., or set overwrite=true to measure again"
            )


def run_stage(stage: str, run: Run) -> dict[str, Any]:
    """Run one stage unless it is finished with this configuration, or the budget needs no training.

    An evaluation that could not tell, because of what the machine was doing meanwhile, is not finished.
    """
    run.check_upstream(stage)
    if run.check(stage) and not (stage == "evaluate" and can_be_verified_again(run.result(stage))):
        console.print(f"[bold]{stage:>9}[/] already done in {escape(str(run.folder(stage)))}", soft_wrap=True)
        result = run.result(stage)
    elif stage == "train" and (decided := result_of_profile(run)):
        result = decided
    else:
        module = importlib.import_module(PLANS[stage].module)
        result = module.run(run.settings(stage), run)
        console.print(f"[bold]{stage:>9}[/] {escape(result['summary'])}", soft_wrap=True)
    if stage == "doctor":
        print_diagnosis(result)
    if "verdict" in result:
        run.conclude(result)
    return result


def can_be_verified_again(result: Mapping[str, Any]) -> bool:
    """Whether an evaluation ended without a verdict only for what the machine was doing meanwhile."""
    measured = result["measured"]["source"] == "measured"
    return bool(result["verdict"] == "unverified" and measured and result["target_ratio"] is not None)


def run_pipeline(run: Run) -> dict[str, Any]:
    """Everything from a teacher to a verdict; `result.json` lies beside the stages' folders then."""
    result: dict[str, Any] = {}
    for stage in order(run.cfg):
        if stage == "pretrain" and (decided := result_of_profile(run)):
            run.conclude(decided)
            return decided
        if stage == "publish" and result["verdict"] not in (*SUCCESS, "unverified"):
            console.print(f"[bold]{stage:>9}[/] left out: the verdict is {result['verdict']}")
            break
        try:
            done = run_stage(stage, run)
        except Exception:
            if stage == "publish":
                print_result(result, run.root)  # what was found out before the hub refused
            raise
        result = {**result, "published": done} if stage == "publish" else done
        if "verdict" in result and stage != "evaluate":
            break
    return result


def result_of_profile(run: Run) -> dict[str, Any] | None:
    """The result when measurements alone decide: the teacher meets the budget already, or nothing can."""
    profile = run.result("profile")
    work = Workspace(run.settings("train"), run)
    if not work.budget.has_target:
        return None
    everything = len(work.gated_groups) == len(work.groups)
    fastest = Interval(**profile["fastest_ratio"]) if everything else measure_fastest(work)
    teacher = Interval(**{name: profile["teacher"][name] for name in ("median", "low", "high")})
    decided = work.budget.decided_by_profile(teacher, fastest)
    if decided is None:
        return None
    verdict, reason = decided
    return {
        "summary": f"{verdict}: {reason}",
        "verdict": verdict,
        "reason": reason,
        "target_ms": work.budget.ratio(teacher.median) * teacher.median,
        "teacher": {"latency_ms": profile["teacher"]},
        "environment": profile["environment"],
    }
