"""Checks what stages will need, then runs one of them, or all in order, skipping what is finished."""

from __future__ import annotations

import importlib
import json

from rich.markup import escape

from hawada.adapters.huggingface import hub
from hawada.core.finetune import NORMS
from hawada.core.formats import check_formats
from hawada.core.structure import summarize_kept
from hawada.core.verdict import Verdict
from hawada.experiment import PLANS, Run, order, upstream
from hawada.experiment.results import (
    Conclusion,
    DecidedByProfile,
    DoctorResult,
    Environment,
    EvaluateResult,
    StageResult,
    TeacherLatency,
    from_json,
)
from hawada.report import console, print_diagnosis, print_result
from hawada.stages.profile import measure_fastest
from hawada.workspace import Subject, check_distillation, open_stage

COMPUTING = ("pretrain", "train", "export", "front", "finetune")  # stages that compute in compute.mixed_precision


def check(stages: list[str], run: Run) -> None:
    """Check what can be checked before any work is done.

    The group filter matches something on the bare architecture; the data fit the model; the teacher's weights are here
    or within reach; earlier measurements are this machine's.

    Raises:
        ValueError: one sentence with the key and the remedy.
    """
    plans = [PLANS[stage] for stage in stages]
    if "publish" in stages:
        check_formats(run.cfg.export.formats)
        if run.cfg.export.push_to is not None:
            hub.check_push(run.cfg.export.push_to)
        if not set(run.cfg.export.formats) <= {"hf"} and _subject("publish", run).adapter.modality == "text":
            raise ValueError("export.formats: onnx and pt2 are for image models; leave export.formats=[hf]")
        if run.cfg.export.push == "gated" and run.cfg.train.weight_optimizer is not None:
            raise ValueError("export.push: gated goes with frozen weights; set train=gates, or export.push=slim")
    if "pretrain" in stages and not run.cfg.model.pretrain:
        raise ValueError("stage=pretrain: this model comes with weights; set model.pretrain=true to train it")
    if stages and not run.cfg.model.pretrain and any(plan.teacher for plan in plans):
        _subject(stages[-1], run).adapter.check_teacher()
    for stage in stages:
        _check_training(stage, run)
    if any("groups" in plan.reads for plan in plans):
        _subject("train", run).check_groups()
    if "train" in stages and not run.is_finished("train"):
        for sentence in summarize_kept(_subject("train", run).kept_whole):
            console.print(escape(f"{sentence}."), soft_wrap=True)
    if "doctor" in stages and run.cfg.gpu.timing == "table":
        raise ValueError(
            "gpu.timing: a latency table knows nothing of launches and bandwidths; set gpu.timing=measured on the "
            "device itself, or gpu.timing=simulated"
        )
    if any(plan.measures for plan in plans):
        subject, watch, _ = open_stage(run.settings("profile"), run)
        subject.adapter.check_shape(watch.shape)
        subject.adapter.check_layout(subject.cfg.export.layout, subject.groups)
    distilling = [plan.name for plan in plans if "distill" in plan.reads]
    if distilling:
        trains = any("kd" in plan.reads for plan in plans)
        check_distillation(_subject(distilling[0], run), trains=trains)
    reading = [plan.name for plan in plans if "data" in plan.reads]
    if reading:
        _subject(reading[0], run).data  # noqa: B018
    if run.cfg.gpu.timing == "measured" and any(plan.measures for plan in plans):
        _check_same_machine(stages, run)


def _subject(stage: str, run: Run) -> Subject:
    """The model of a stage."""
    return open_stage(run.settings(stage), run)[0]


def _check_training(stage: str, run: Run) -> None:
    """Refuse a precision that the device cannot train with, and batches that BatchNorm cannot.

    Raises:
        ValueError: naming the key.
    """
    if stage not in COMPUTING:
        return
    subject = _subject(stage, run)
    if subject.cfg.compute.mixed_precision == "fp16" and subject.device.type != "cuda":
        raise ValueError(
            f"compute.mixed_precision: fp16 needs an NVIDIA GPU and models train on the {subject.device.type} here; "
            "set compute.mixed_precision=no"
        )
    alone = stage in ("pretrain", "finetune") and subject.cfg[stage].batch_size == 1
    if alone and any(isinstance(module, NORMS) for module in subject.meta.modules()):
        raise ValueError(
            f"{stage}.batch_size: BatchNorm cannot be trained on 1 image at a time; set schedule.batch_size to 2 or "
            "more"
        )


def _check_same_machine(stages: list[str], run: Run) -> None:
    """Refuse latencies that another machine or stack measured, or with overwrite=true take them afresh."""
    here = open_stage(run.settings("profile"), run)[2].environment.fingerprint
    needed = {earlier for stage in stages for earlier in (*upstream(stage, run.cfg), stage)}
    for stage in [name for name in PLANS if name in needed and PLANS[name].measures and run.is_finished(name)]:
        path = run.folder(stage) / "environment.json"
        remedy = "choose another name=..., or set overwrite=true to measure again"
        try:
            recorded: Environment = from_json(Environment, json.loads(path.read_text()), place=str(path), remedy=remedy)
        except ValueError:  # damaged, or another version's
            if not (run.overwrite and stage in stages):
                raise
            run.discard(stage)
            continue
        there = recorded.fingerprint
        different = [f"{key} {there.get(key)}" for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
        if different and run.overwrite and stage in stages:
            run.discard(stage)
        elif different:
            raise ValueError(
                f"{run.folder(stage)} was measured elsewhere ({', '.join(different)}) and latencies do not carry over; "
                + f"choose another name=..., or set overwrite=true {'' if stage in stages else f'and stage={stage} '}"
                + "to measure again"
            )


def run_stage(stage: str, run: Run) -> StageResult:
    """Run one stage unless it is finished with this configuration, or the budget needs no training.

    An evaluation that could not tell, because of what the machine was doing meanwhile, is not finished.
    """
    run.check_upstream(stage)
    result: StageResult | None = run.result(stage) if run.check(stage) else None
    if isinstance(result, EvaluateResult) and can_be_verified_again(result):
        result = None
    if result is not None:
        console.print(f"[bold]{stage:>9}[/] already done in {escape(str(run.folder(stage)))}", soft_wrap=True)
    elif stage == "train" and (decided := result_of_profile(run)):
        result = decided
    else:
        module = importlib.import_module(PLANS[stage].module)
        result = module.run(run.settings(stage), run)
        console.print(f"[bold]{stage:>9}[/] {escape(result.summary)}", soft_wrap=True)
    if isinstance(result, DoctorResult):
        print_diagnosis(result)
    if isinstance(result, Conclusion):
        run.conclude(result)
    return result


def can_be_verified_again(result: EvaluateResult) -> bool:
    """Whether an evaluation ended without a verdict only for what the machine was doing meanwhile."""
    undecided = result.verdict is Verdict.UNVERIFIED and result.measured.source == "measured"
    return undecided and result.target_ratio is not None


def run_pipeline(run: Run) -> Conclusion:
    """Everything from a teacher to a verdict; `result.json` lies beside the stages' folders then."""
    conclusion: Conclusion | None = None
    for stage in order(run.cfg):
        if stage == "pretrain" and not run.is_finished("train") and (decided := result_of_profile(run)):
            run.conclude(decided)
            return decided
        if stage == "publish" and conclusion is not None and not conclusion.verdict.may_be_published:
            console.print(f"[bold]{stage:>9}[/] left out: the verdict is {conclusion.verdict}")
            break
        try:
            done = run_stage(stage, run)
        except Exception:
            if stage == "publish" and conclusion is not None:
                print_result(conclusion, run.root)  # what was found out before the hub refused
            raise
        if isinstance(done, Conclusion):
            conclusion = done
            if stage != "evaluate":
                break
    assert conclusion is not None
    return conclusion


def result_of_profile(run: Run) -> DecidedByProfile | None:
    """The result when measurements alone decide: the teacher meets the budget already, or nothing can."""
    profile = run.result("profile")
    subject, watch, _ = open_stage(run.settings("train"), run)
    if not watch.budget.has_target:
        return None
    everything = len(subject.gated_groups) == len(subject.groups)
    fastest = profile.fastest_ratio if everything else measure_fastest(watch)
    teacher = profile.teacher
    decided = watch.budget.decided_by_profile(teacher, fastest)
    if decided is None or (profile.noisy is not None and decided[0] is Verdict.INFEASIBLE):
        return None  # a machine that others use makes everything look too slow: the search finds out
    verdict, reason = decided
    return DecidedByProfile(
        summary=f"{verdict}: {reason}",
        verdict=verdict,
        reason=reason,
        target_ms=watch.budget.ratio(teacher.median) * teacher.median,
        teacher=TeacherLatency(latency_ms=teacher),
        environment=profile.environment,
    )
