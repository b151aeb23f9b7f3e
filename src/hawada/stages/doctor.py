"""Finds what bounds a model on a device, what pruning could buy there, and which target is sensible, before training.

The latency does not depend on the weights' values, so the untrained architecture is measured; no data are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from omegaconf import DictConfig
from torch import nn

from hawada.core.latency import (
    Peaks,
    Rounds,
    Staircase,
    bootstrap_median,
    capture_arguments,
    extreme_keep,
    find_bottleneck,
    half_keep,
    list_operators,
    measure_peaks,
    measure_staircase,
    removed_fraction,
    sensible_ratios,
    stair_axes,
    summarize,
)
from hawada.core.structure import Keep, keep_all, summarize_kept, widths_of
from hawada.experiment import Run
from hawada.experiment.results import (
    Bandwidth,
    BottleneckFigures,
    ComparedRuntime,
    DoctorResult,
    PeakFigures,
    RefusedRuntime,
    RemovableUnits,
    SensibleTarget,
    Stairs,
    TimedAs,
    TimedModel,
    TimedSlice,
)
from hawada.report import Progress, describe, plot_staircases, summarize_findings
from hawada.workspace import ModelStopwatch, Subject, open_stage

PROBED_AGAIN = 2  # times at most, where the model did better than the probes had found possible
RUNTIME_ERRORS = (ValueError, RuntimeError, NotImplementedError)  # what a runtime raises that cannot hold a model


def run(cfg: DictConfig, run: Run) -> DoctorResult:
    """Write `doctor/result.json` and `doctor/staircase.png`."""
    subject, watch, store = open_stage(cfg, run)
    subject.adapter.check_layout(cfg.export.layout, subject.groups)
    axes = stair_axes(subject.sites, subject.groups)
    with store.writing("doctor") as folder, Progress("doctor", 3 + len(axes)) as progress:
        progress.say("measuring what the device can do")
        peaks = measure_peaks(watch.clock, watch.device, watch.dtype)
        teacher = watch.placed(subject.adapter.skeleton())
        operators = list_operators(watch.timed(teacher), watch.inputs(), on_shapes=watch.clock.simulated)
        progress.step("measuring the smallest models")
        keeps = _slices(subject)
        models = {name: watch.timed(subject.slim(teacher, keep)) for name, keep in keeps.items()}
        whole, measured = _compare(watch, watch.timed(teacher), models)
        teacher_ms = whole.latency_ms.median
        bottleneck = find_bottleneck(operators, peaks, teacher_ms)
        for _ in range(PROBED_AGAIN):
            if bottleneck.impossible:
                peaks = peaks.best_of(measure_peaks(watch.clock, watch.device, watch.dtype))
                bottleneck = find_bottleneck(operators, peaks, teacher_ms)
        progress.step("comparing runtimes")
        runtimes = _compare_runtimes(watch, watch.timed(teacher), models.get("half"))
        progress.step()
        stairs = []
        for axis in axes:
            progress.say(f"widths of {axis[1].name}")
            stairs.append(_staircase(watch, teacher, axis))
            progress.step()
        result = DoctorResult(
            summary="",
            words=(),
            bottleneck=BottleneckFigures(
                **asdict(bottleneck), shares=bottleneck.shares, impossible=bottleneck.impossible
            ),
            peaks=_peaks(peaks),
            teacher=whole,
            slices={
                name: TimedSlice(
                    removed=removed_fraction(keep, subject.groups),
                    widths=widths_of(keep, subject.groups),
                    latency_ms=measured[name].latency_ms,
                    ratio=measured[name].ratio,
                )
                for name, keep in keeps.items()
            },
            runtimes=runtimes,
            stairs=tuple(Stairs(**asdict(stair)) for stair in stairs),
            target=_target(measured, teacher_ms),
            timed_as=TimedAs(**{**watch.timed_as, "device": watch.kind, "runtime": _runtimes(watch)[0]}),
            units=_units(subject, keeps.get("half")),
            simulated=watch.clock.simulated,
            environment=store.environment,
        )
        plot_staircases(folder / "staircase.png", result.stairs, title=_title(watch))
        words = (*describe(result), *(f"{sentence}." for sentence in summarize_kept(subject.kept_whole)))
        result = replace(result, summary=summarize_findings(result), words=words)
        return run.finish("doctor", result)


def _slices(subject: Subject) -> dict[str, Keep]:
    """The slices that tell what pruning can buy; those that remove nothing are left out."""
    groups, policy = subject.groups, subject.policy
    keeps = {
        "half": half_keep(groups, policy),
        "width": extreme_keep(groups, policy, width=True, depth=False),
        "depth": extreme_keep(groups, policy, width=False, depth=True),
        "both": extreme_keep(groups, policy, width=True, depth=True),
    }
    whole = keep_all(groups)
    return {name: keep for name, keep in keeps.items() if keep != whole}


def _rounds(watch: ModelStopwatch) -> Rounds:
    return replace(watch.rounds, max_seconds=min(watch.rounds.max_seconds, watch.cfg.doctor.max_seconds))


def _compare(
    watch: ModelStopwatch, teacher: nn.Module, models: Mapping[str, nn.Module]
) -> tuple[TimedModel, dict[str, TimedModel]]:
    """Latency of the teacher and of each model, and their ratios to the teacher, in the same interleaved rounds."""
    inputs = watch.inputs()
    samplers = [watch.clock.prepare(model, inputs) for model in (teacher, *models.values())]
    samples = watch.sample(samplers, _rounds(watch)).samples
    timed = [
        TimedModel(latency_ms=summarize(column), ratio=bootstrap_median(column / samples[:, 0])) for column in samples.T
    ]
    return timed[0], dict(zip(models, timed[1:], strict=True))


def _runtimes(watch: ModelStopwatch) -> list[str]:
    """The runtimes to compare; the first is the one that everything else is measured in."""
    own = watch.cfg.runtime.get("mode", "eager")
    if watch.clock.simulated:
        return [own]
    others = ("eager", "cudagraph") if watch.device.type == "cuda" else ()
    return list(dict.fromkeys((own, *(watch.cfg.doctor.runtimes or others))))


def _compare_runtimes(
    watch: ModelStopwatch, teacher: nn.Module, half: nn.Module | None
) -> dict[str, ComparedRuntime | RefusedRuntime]:
    """For each further runtime, the teacher's ratio to its time in the first, and the half-width model's to the
    teacher's in the same; or why it cannot be used."""
    own, *others = _runtimes(watch)
    inputs = watch.inputs()
    found: dict[str, ComparedRuntime | RefusedRuntime] = {}
    for runtime in others:
        try:
            clock = watch.clock_of(runtime)
            models = [teacher] if half is None else [teacher, half]
            samplers = [watch.clock.prepare(teacher, inputs), *(clock.prepare(model, inputs) for model in models)]
            samples = watch.sample(samplers, _rounds(watch)).samples
        except RUNTIME_ERRORS as error:
            found[runtime] = RefusedRuntime(refused=" ".join(str(error).split()))
            continue
        found[runtime] = ComparedRuntime(
            latency_ms=summarize(samples[:, 1]),
            against=own,
            ratio=bootstrap_median(samples[:, 1] / samples[:, 0]),
            half=None if half is None else bootstrap_median(samples[:, 2] / samples[:, 1]),
        )
    return found


def _staircase(watch: ModelStopwatch, teacher: nn.Module, axis: Any) -> Staircase:
    """The staircase of one site, called as in the first call that the phase is made of."""
    subject = watch.subject
    _, call, shape = subject.adapter.parts(teacher, watch.shape)[0]
    site = axis[0].module
    arguments = capture_arguments(teacher, [site], call, watch.inputs(shape))[site]
    rounds = _rounds(watch)
    rounds = replace(rounds, min_rounds=min(rounds.min_rounds, 6), max_rounds=min(rounds.max_rounds, 24))
    return measure_staircase(
        teacher,
        subject.groups,
        axis,
        arguments,
        watch.clock,
        points=subject.cfg.doctor.points,
        rounds=rounds,
        slice_site=subject.adapter.slice_site,
        monitor=watch.monitor,
    )


def _peaks(peaks: Peaks) -> PeakFigures:
    return PeakFigures(
        launch_us=peaks.launch_ms * 1e3,
        gbps=tuple(Bandwidth(bytes=size, gbps=size / ms / 1e6) for size, ms in peaks.transfers),
        tflops=peaks.flops_per_ms / 1e9,
    )


def _target(measured: Mapping[str, TimedModel], teacher_ms: float) -> SensibleTarget | None:
    """The range of sensible targets, as ratios and in milliseconds."""
    if "both" not in measured:
        return None
    half = measured["half"].ratio.median if "half" in measured else 1.0
    ratios = sensible_ratios(measured["both"].ratio.high, half)
    if ratios is None:
        return None
    low, high = ratios
    return SensibleTarget(ratio=(low, high), ms=(low * teacher_ms, high * teacher_ms))


def _units(subject: Subject, half: Keep | None) -> RemovableUnits:
    """What may go: kinds of units that the half-width slice halves, and kinds of layers and branches."""
    halved: Sequence[str] = [] if half is None else [g.kind for g in subject.groups if len(half[g.name]) < g.units]
    return RemovableUnits(
        width=tuple(dict.fromkeys(halved)),
        depth=tuple(dict.fromkeys(group.kind for group in subject.groups if group.removes)),
    )


def _title(watch: ModelStopwatch) -> str:
    device = f"{watch.cfg.gpu.name}, simulated" if watch.clock.simulated else watch.cfg.gpu.name
    return f"{watch.cfg.model.name}, batch {watch.batch}, {watch.shape.phase}, {watch.cfg.gpu.dtype} on {device}"
