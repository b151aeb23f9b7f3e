"""Many targets from one training: the Pareto front of value and measured latency, without a training step."""

from __future__ import annotations

import time
from typing import Any

from omegaconf import DictConfig

from hawada.core.latency import Comparison
from hawada.core.search import search_export
from hawada.core.structure import Keep, widths_of
from hawada.experiment import Run, write_json
from hawada.report import Progress, plot_front, print_front
from hawada.stages.export import described, load_student, make_search, measuring, prove_equivalence, tell
from hawada.workspace import Quality, Workspace, load_proxy


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Write `front/<target>/slim` for every target in `budget.target_ratio`, a table and a plot of what was measured.

    Every measurement joins the proxy's fit, so later targets need fewer.
    """
    work = Workspace(cfg, run)
    targets = sorted({float(target) for target in cfg.budget.target_ratio}, reverse=True)
    teacher = work.teacher()
    student = load_student(work, teacher)
    proxy = load_proxy(work, "train")
    points: list[dict[str, Any]] = []
    start, measuring_s = time.perf_counter(), 0.0
    with (
        work.writing("front") as folder,
        Progress("front", cfg.export.max_measurements * len(targets)) as progress,
        measuring(work, student.model, teacher, lambda measured: tell(progress, measured)) as measure,
    ):
        quality = Quality(work, student, teacher, progress)

        def timed(keep: Keep) -> Comparison:
            nonlocal measuring_s
            began = time.perf_counter()
            comparison = measure(keep)
            measuring_s += time.perf_counter() - began
            return comparison

        for target in targets:
            progress.say(f"target {target:g}")
            search = make_search(work, student, quality, timed, work.budget_for(target), proxy)
            found = search_export(search, cfg.export.max_measurements)
            point = {"target_ratio": target, "value": found.chosen.value, **described(found, work.groups)}
            if found.status != "infeasible":
                slim = work.slim(student.model, found.chosen.keep)
                point["equivalence"] = prove_equivalence(work, student, slim, found.chosen.keep)
                slim, refit = quality.compensated(slim, found.chosen.keep)
                point |= refit
                path = folder / f"{target:g}"
                work.save(path / "slim", slim, found.chosen.keep)
                write_json(path / "keep.json", {name: list(kept) for name, kept in found.chosen.keep.items()})
                point |= {"path": work.absolute(path / "slim"), "widths": widths_of(found.chosen.keep, work.groups)}
            points.append(point)
        progress.done()
        plot_front(points, folder / "front.png", title=run.root.name)
        print_front(points, run.root.name)
        reached = sum(point["status"] != "infeasible" for point in points)
        return run.finish(
            "front",
            {
                "summary": f"{reached} of {len(points)} targets reached, see {folder / 'front.png'}",
                "points": points,
                **quality.as_dict(),
                "seconds": {"all": time.perf_counter() - start, "measuring": measuring_s},
                "teacher_ms": run.result("profile")["teacher_ms"],
                "timed_as": work.timed_as,
                "environment": work.environment(),
            },
        )
