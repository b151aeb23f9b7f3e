"""How close to its target does an exported model land? Every cell is measured again, in a process of its own.

    python benchmarks/target_accuracy.py --output benchmarks/results/target_accuracy_cpu.json

Cells are models x batch sizes x ratios. Gates are random (latency does not depend on what they were trained to). A
cell counts when at least three allocations of the table lie in its window, or there is nothing to choose from. Further
overrides go after `--`, e.g. `-- gpu=h100 runtime=cudagraph`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from hawada.config import conf_dir, register_resolvers
from hawada.core.profiler import Comparison
from hawada.core.search_export import BudgetSearch, search_export
from hawada.core.structure import Keep, keep_all, widths_of
from hawada.run import Run
from hawada.stages import profile
from hawada.stages.judge import judge_afresh
from hawada.stages.tables import load_proxy
from hawada.stages.workspace import Workspace

ENOUGH = 3  # allocations in the window
ABOVE = 0.005  # of the target: how far the point estimate of the second measurement may lie above


def run_of(model: str, batch: int, root: Path, overrides: list[str]) -> Run:
    """An experiment with its profile."""
    register_resolvers()
    options = [f"model={model}", f"budget.batch={batch}", f"name={model}-batch{batch}", f"output_dir={root}"]
    options.append("profile.held_out=2")  # fidelity has a benchmark of its own
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("config", [*options, *overrides])
    run = Run(root / cfg.name, cfg)
    profile.run(run.settings("profile"), run)
    return run


def judge(run: Run, ratio: float, seed: int) -> dict[str, Any]:
    """Search for one target and measure what was found afresh."""
    work = Workspace(run.settings("evaluate"), run)
    choosing = Workspace(run.settings("export"), run)
    generator = torch.Generator().manual_seed(seed)
    saliency = {g.name: (0.1 + torch.rand(g.units, generator=generator)) / g.units for g in work.groups}
    teacher = work.adapter.skeleton()
    reference = choosing.timed(work.adapter.skeleton())

    def measure(keep: Keep) -> Comparison:
        return choosing.compare(reference, choosing.timed(work.slim(teacher, keep)))

    start = time.perf_counter()
    search = BudgetSearch(
        groups=work.groups,
        saliency=saliency,
        proxy=load_proxy(choosing, "profile"),
        policies=choosing.policies,
        measure=measure,
        budget=choosing.budget_for(ratio),
        teacher_ms=run.result("profile")["teacher_ms"],
    )
    found = search_export(search)
    record: dict[str, Any] = {"target_ratio": ratio, "status": found.status, "measurements": len(found.candidates)}
    record |= {"seconds": time.perf_counter() - start, "in_window": in_window(search, ratio)}
    record["searched_ratio"] = found.chosen.comparison.ratio.median
    folder = run.root / "judged"
    folder.mkdir(exist_ok=True)
    work.save(folder / "teacher", teacher, keep_all(work.groups))
    work.save(folder / "slim", work.slim(teacher, found.chosen.keep), found.chosen.keep)
    again = judge_afresh(work, folder / "teacher", folder / "slim", folder).comparison
    assert again is not None
    record |= {"ratio": again.ratio.as_dict(), "of_target": again.ratio.median / ratio, "noisy": again.noisy}
    low = 1 - choosing.budget_for(ratio).tolerance
    return record | {
        "counts": record["in_window"] >= ENOUGH and found.status != "infeasible",
        "inside": bool(low <= record["of_target"] <= 1 + ABOVE),
    }


def in_window(search: BudgetSearch, ratio: float) -> int:
    """How many different allocations the table has in the window, counted up to ten."""
    allocation = search._allocation(0)
    target, tolerance = ratio * search.teacher_ms, search.budget.tolerance
    seen = set()
    for share in np.linspace(1 - tolerance, 1, 40):
        widths = allocation.within(share * target)
        if (1 - tolerance) * target <= float(search.proxy.predict(widths)) <= target:
            seen.add(tuple(sorted(widths_of(allocation.keep(widths), search.groups).items())))
    return min(len(seen), 10)


def main() -> None:
    """Judge every cell and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny_resnet", "tiny_vit", "tiny_llama"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.65, 0.5, 0.35])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", help="further hawada overrides")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for model in arguments.models:
        for batch in arguments.batches:
            with tempfile.TemporaryDirectory() as root:
                run = run_of(model, batch, Path(root), arguments.overrides)
                environment, quality = run.result("profile")["environment"], run.result("profile")["fidelity"]
                for seed, ratio in enumerate(arguments.ratios):
                    record = {"model": model, "batch": batch, "proxy": quality} | judge(run, ratio, seed)
                    records.append(record)
                    print(
                        f"{model:12} batch {batch:3} target {ratio:.2f}: {record['status']:10} "
                        f"{record['of_target'] - 1:+.1%} of the target [{record['ratio']['low'] / ratio - 1:+.1%}, "
                        f"{record['ratio']['high'] / ratio - 1:+.1%}], {record['measurements']} measured, "
                        f"{record['in_window']} in the window, "
                        f"{'does not count' if not record['counts'] else 'inside' if record['inside'] else 'OUTSIDE'}"
                        f"{', noisy: ' + record['noisy'] if record['noisy'] else ''}",
                        flush=True,
                    )
            counted = [record for record in records if record["counts"]]
            summary = {"counted": len(counted), "inside": sum(record["inside"] for record in counted)}
            whole = {"environment": environment, "summary": summary, "cells": records}
            arguments.output.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"{summary['inside']} of {summary['counted']} cells that count, of {len(records)}, are inside")
    print(json.dumps(environment))


if __name__ == "__main__":
    main()
