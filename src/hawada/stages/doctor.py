"""Says before any training what bounds a model on a device, what pruning could buy there, and which target is sensible.

The latency does not depend on the weights' values, so the untrained architecture is measured; no data are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from omegaconf import DictConfig
from torch import nn

from hawada.config import build
from hawada.core.latency import (
    Clock,
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
    sample_rounds,
    sensible_ratios,
    stair_axes,
    summarize,
)
from hawada.core.structure import Keep, keep_all, widths_of
from hawada.experiment import Run
from hawada.report import Progress, describe, plot_staircases, summarize_findings
from hawada.workspace import Workspace

PROBED_AGAIN = 2  # times at most, where the model did better than the probes said was possible
REFUSALS = (ValueError, RuntimeError, NotImplementedError)  # what a runtime raises that cannot hold a model


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Write `doctor/result.json` and `doctor/staircase.png`."""
    work = Workspace(cfg, run)
    work.adapter.check_layout(cfg.export.layout, work.groups)
    axes = stair_axes(work.sites, work.groups)
    with work.writing("doctor") as folder, Progress("doctor", 3 + len(axes)) as progress:
        progress.say("measuring what the device can do")
        peaks = measure_peaks(work.clock, work.device, work.dtype)
        teacher = work.placed(work.adapter.skeleton())
        operators = list_operators(work.timed(teacher), work.inputs(), on_shapes=work.clock.simulated)
        progress.step("measuring the smallest models")
        keeps = _slices(work)
        models = {name: work.timed(work.slim(teacher, keep)) for name, keep in keeps.items()}
        measured = _compare(work, work.timed(teacher), models)
        teacher_ms = measured["teacher"]["latency_ms"]["median"]
        bottleneck = find_bottleneck(operators, peaks, teacher_ms)
        for _ in range(PROBED_AGAIN):
            if bottleneck.impossible:
                peaks = peaks.best_of(measure_peaks(work.clock, work.device, work.dtype))
                bottleneck = find_bottleneck(operators, peaks, teacher_ms)
        progress.step("comparing runtimes")
        runtimes = _compare_runtimes(work, work.timed(teacher), models.get("half"))
        progress.step()
        stairs = []
        for axis in axes:
            progress.say(f"widths of {axis[1].name}")
            stairs.append(_staircase(work, teacher, axis))
            progress.step()
        result: dict[str, Any] = {
            "bottleneck": bottleneck.as_dict(),
            "peaks": _peaks(peaks),
            "teacher": measured.pop("teacher"),
            "slices": {
                name: {
                    "removed": removed_fraction(keeps[name], work.groups),
                    "widths": widths_of(keeps[name], work.groups),
                    **measured[name],
                }
                for name in keeps
            },
            "runtimes": runtimes,
            "stairs": [asdict(stair) for stair in stairs],
            "target": _target(measured, teacher_ms),
            "timed_as": {**work.timed_as, "device": _device(work), "runtime": _runtimes(work)[0]},
            "units": _units(work, keeps.get("half")),
            "simulated": work.clock.simulated,
            "environment": work.environment(),
        }
        plot_staircases(folder / "staircase.png", result["stairs"], title=_title(work))
        words = describe(result)
        return run.finish("doctor", {"summary": summarize_findings(result), "words": words, **result})


def _slices(work: Workspace) -> dict[str, Keep]:
    """The slices that tell what pruning can buy; those that remove nothing are left out."""
    groups, policy = work.groups, work.policy
    keeps = {
        "half": half_keep(groups, policy),
        "width": extreme_keep(groups, policy, width=True, depth=False),
        "depth": extreme_keep(groups, policy, width=False, depth=True),
        "both": extreme_keep(groups, policy, width=True, depth=True),
    }
    whole = keep_all(groups)
    return {name: keep for name, keep in keeps.items() if keep != whole}


def _rounds(work: Workspace) -> Rounds:
    return replace(work.rounds, max_seconds=min(work.rounds.max_seconds, work.cfg.doctor.max_seconds))


def _compare(work: Workspace, teacher: nn.Module, models: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Latency of the teacher and of each model, and their ratios to the teacher, in the same interleaved rounds."""
    inputs = work.inputs()
    samplers = [work.clock.prepare(model, inputs) for model in (teacher, *models.values())]
    samples = sample_rounds(samplers, _rounds(work), work.cfg.seed)
    return {
        name: {
            "latency_ms": summarize(samples[:, column]).as_dict(),
            "ratio": bootstrap_median(samples[:, column] / samples[:, 0]).as_dict(),
        }
        for column, name in enumerate(("teacher", *models))
    }


def _runtimes(work: Workspace) -> list[str]:
    """The runtimes to compare; the first is the one that everything else is measured in."""
    own = work.cfg.runtime.get("mode", "eager")
    if work.clock.simulated:
        return [own]
    others = ("eager", "cudagraph") if work.device.type == "cuda" else ()
    return list(dict.fromkeys((own, *(work.cfg.doctor.runtimes or others))))


def _device(work: Workspace) -> str:
    """The kind of device that the times are for, which in a rehearsal is not the one here."""
    return work.device.type if work.cfg.gpu.device == "auto" else work.cfg.gpu.device


def _clock(work: Workspace, runtime: str) -> Clock:
    return build(work.cfg.gpu.clock, runtime=runtime)


def _compare_runtimes(work: Workspace, teacher: nn.Module, half: nn.Module | None) -> dict[str, dict[str, Any]]:
    """For each further runtime, the teacher's ratio to its time in the first, and the half-width model's to the
    teacher's in the same; or why it cannot be used."""
    own, *others = _runtimes(work)
    inputs = work.inputs()
    found: dict[str, dict[str, Any]] = {}
    for runtime in others:
        try:
            clock = _clock(work, runtime)
            models = [teacher] if half is None else [teacher, half]
            samplers = [work.clock.prepare(teacher, inputs), *(clock.prepare(model, inputs) for model in models)]
            samples = sample_rounds(samplers, _rounds(work), work.cfg.seed)
        except REFUSALS as error:
            found[runtime] = {"refused": " ".join(str(error).split())}
            continue
        found[runtime] = {
            "latency_ms": summarize(samples[:, 1]).as_dict(),
            "against": own,
            "ratio": bootstrap_median(samples[:, 1] / samples[:, 0]).as_dict(),
        }
        if half is not None:
            found[runtime]["half"] = bootstrap_median(samples[:, 2] / samples[:, 1]).as_dict()
    return found


def _staircase(work: Workspace, teacher: nn.Module, axis: Any) -> Staircase:
    """The staircase of one site, called as in the first call that the phase is made of."""
    _, call, shape = work.adapter.parts(teacher, work.shape)[0]
    site = axis[0].module
    arguments = capture_arguments(teacher, [site], call, work.inputs(shape))[site]
    rounds = _rounds(work)
    rounds = replace(rounds, min_rounds=min(rounds.min_rounds, 6), max_rounds=min(rounds.max_rounds, 24))
    return measure_staircase(
        teacher,
        work.groups,
        axis,
        arguments,
        work.clock,
        points=work.cfg.doctor.points,
        rounds=rounds,
        slice_site=work.adapter.slice_site,
    )


def _peaks(peaks: Peaks) -> dict[str, Any]:
    return {
        "launch_us": peaks.launch_ms * 1e3,
        "gbps": [{"bytes": size, "gbps": size / ms / 1e6} for size, ms in peaks.transfers],
        "tflops": peaks.flops_per_ms / 1e9,
    }


def _target(measured: Mapping[str, Any], teacher_ms: float) -> dict[str, list[float]] | None:
    """The range of sensible targets, as ratios and in milliseconds."""
    if "both" not in measured:
        return None
    half = measured["half"]["ratio"]["median"] if "half" in measured else 1.0
    ratios = sensible_ratios(measured["both"]["ratio"]["high"], half)
    return None if ratios is None else {"ratio": list(ratios), "ms": [ratio * teacher_ms for ratio in ratios]}


def _units(work: Workspace, half: Keep | None) -> dict[str, Any]:
    """What may go: kinds of units that the half-width slice halves, and kinds of layers and branches."""
    halved: Sequence[str] = [] if half is None else [g.kind for g in work.groups if len(half[g.name]) < g.units]
    return {
        "width": list(dict.fromkeys(halved)),
        "depth": list(dict.fromkeys(group.kind for group in work.groups if group.removes)),
    }


def _title(work: Workspace) -> str:
    device = f"{work.cfg.gpu.name}, simulated" if work.clock.simulated else work.cfg.gpu.name
    return f"{work.cfg.model.name}, batch {work.batch}, {work.shape.phase}, {work.cfg.gpu.dtype} on {device}"
