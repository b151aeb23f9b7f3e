"""Many targets from one training: the Pareto front of saliency and measured latency, without a training step."""

from __future__ import annotations

import time
from typing import Any

from omegaconf import DictConfig

from hawada.core.files import write_json
from hawada.core.search import search_export
from hawada.core.structure import Keep, widths_of
from hawada.core.verdict import Comparison
from hawada.experiment import Run
from hawada.report import Progress, plot_front, print_front
from hawada.stages.export import described, load_student, make_search, measuring, prove_equivalence, tell
from hawada.workspace import Quality, load_proxy, open_stage


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Write `front/<target>/slim` for every target in `budget.target_ratio`, a table and a plot of what was measured.

    Every measurement joins the proxy's fit, so later targets need fewer.
    """
    subject, watch, store = open_stage(cfg, run)
    targets = sorted({float(target) for target in cfg.budget.target_ratio}, reverse=True)
    teacher = subject.teacher()
    student = load_student(subject, teacher)
    proxy = load_proxy(subject, "train")
    points: list[dict[str, Any]] = []
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
            point = {"target_ratio": target, "worth": found.chosen.worth, **described(found, subject.groups)}
            if found.status != "infeasible":
                slim = subject.slim(student.model, found.chosen.keep)
                point["equivalence"] = prove_equivalence(subject, student, slim, found.chosen.keep)
                slim, refit = quality.compensated(slim, found.chosen.keep)
                point |= refit
                path = folder / f"{target:g}"
                subject.save(path / "slim", slim, found.chosen.keep)
                write_json(path / "keep.json", {name: list(kept) for name, kept in found.chosen.keep.items()})
                point |= {
                    "path": str((path / "slim").resolve()),
                    "widths": widths_of(found.chosen.keep, subject.groups),
                }
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
                "timed_as": watch.timed_as,
                "environment": store.environment,
            },
        )
