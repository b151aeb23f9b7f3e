"""Many targets from one training: the Pareto front of value and measured latency, without a training step."""

from __future__ import annotations

import time
from dataclasses import replace

from omegaconf import DictConfig

from hawada.core.files import write_json
from hawada.core.search import search_export
from hawada.core.structure import Keep, widths_of
from hawada.core.verdict import Comparison
from hawada.experiment import Run
from hawada.experiment.results import FrontPoint, FrontResult, FrontSeconds, TimedAs
from hawada.report import Progress, plot_front, print_front
from hawada.stages.export import described, load_student, make_search, measuring, prove_equivalence, tell
from hawada.workspace import Quality, load_proxy, open_stage


def run(cfg: DictConfig, run: Run) -> FrontResult:
    """Write `front/<target>/slim` for every target in `budget.target_ratio`, a table and a plot of what was measured.

    Every measurement joins the proxy's fit, so later targets need fewer.
    """
    subject, watch, store = open_stage(cfg, run)
    targets = sorted({float(target) for target in cfg.budget.target_ratio}, reverse=True)
    teacher = subject.teacher()
    student = load_student(subject, teacher)
    proxy = load_proxy(subject, "train")
    points: list[FrontPoint] = []
    start, measuring_s = time.perf_counter(), 0.0
    with (
        store.writing("front") as folder,
        Progress("front", cfg.export.max_measurements * len(targets)) as progress,
        measuring(watch, student.model, teacher, lambda measured: tell(progress, measured)) as measure,
    ):
        quality = Quality(subject, student, teacher, progress, has_target=True)

        def timed(keep: Keep) -> Comparison:
            nonlocal measuring_s
            began = time.perf_counter()
            comparison = measure(keep)
            measuring_s += time.perf_counter() - began
            return comparison

        for target in targets:
            progress.say(f"target {target:g}")
            search = make_search(watch, student, quality, timed, watch.budget_for(target), proxy)
            found = search_export(search, cfg.export.max_measurements)
            outcome, keep = described(found, subject.groups), found.chosen.keep
            point = FrontPoint(
                summary=outcome.summary,
                status=outcome.status,
                measured=outcome.measured,
                candidates=outcome.candidates,
                target_ratio=target,
                value=found.chosen.value,
            )
            if found.status != "infeasible":
                slim = subject.slim(student.model, keep)
                equivalence = prove_equivalence(subject, student, slim, keep)
                slim, reconstruction = quality.reconstructed(slim, keep)
                path = folder / f"{target:g}"
                subject.save(path / "slim", slim, keep)
                write_json(path / "keep.json", {name: list(kept) for name, kept in keep.items()})
                point = replace(
                    point,
                    equivalence=equivalence,
                    refitted=reconstruction.refitted,
                    nats=reconstruction.nats,
                    path=str((path / "slim").resolve()),
                    widths=widths_of(keep, subject.groups),
                )
            points.append(point)
        progress.done()
        plot_front(points, folder / "front.png", title=run.root.name)
        print_front(points, run.root.name)
        reached = sum(point.status != "infeasible" for point in points)
        result = FrontResult(
            summary=f"{reached} of {len(points)} targets reached, see {folder / 'front.png'}",
            points=tuple(points),
            sensitivity=quality.sensitivities,
            seconds=FrontSeconds(all=time.perf_counter() - start, measuring=measuring_s),
            teacher_ms=run.result("profile").teacher_ms,
            timed_as=TimedAs(**watch.timed_as),
            environment=store.environment,
        )
        return run.finish("front", result)
