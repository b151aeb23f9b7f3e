"""Does the search keep its promise where all times are known exactly? Random problems on a simulated, noisy device.

    python benchmarks/simulated_targets.py --output benchmarks/results/simulated_targets.json

Three families, targets from 0.3 to 0.9 of the teacher's time, noise of 0 to 2 %, random saliency. Every model found
is timed without noise. On a part of each problem, few groups gated, the choice is compared with all possible ones.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from hawada.config import conf_dir, register_resolvers
from hawada.core.latency import Comparison, Rounds
from hawada.core.search import BudgetSearch, search_export
from hawada.core.search.allocation import Allocation
from hawada.core.structure import Keep, widths_of
from hawada.experiment import Run
from hawada.stages import profile
from hawada.workspace import Workspace, load_proxy

TOLERANCE = 0.03
FAMILIES = {"tiny_resnet": [], "tiny_vit": ["export.layout=heterogeneous"], "tiny_llama": ["budget.prompt=64"]}
OPTIONS = [
    "gpu.timing=simulated",
    f"budget.tolerance={TOLERANCE}",
    "budget.batch=8",
    "runtime.threads=1",
    "profile.held_out_models=2",
]
ALL = 20_000  # choices that are all tried, at most


def profiled(model: str, root: Path) -> Workspace:
    """A family with its table, on a device without noise."""
    register_resolvers()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("config", [f"model={model}", f"output_dir={root}", *OPTIONS, *FAMILIES[model]])
    run = Run(root / cfg.name, cfg)
    profile.run(run.settings("profile"), run)
    return Workspace(run.settings("export"), run)


def problems(count: int) -> Iterator[tuple[float, float, int]]:
    """(target ratio, noise, seed)."""
    random = np.random.default_rng(0)
    for seed in range(count):
        yield float(random.uniform(0.3, 0.9)), float(random.choice([0.0, 0.005, 0.01, 0.02])), seed


def solve(work: Workspace, ratio: float, noise: float, seed: int) -> dict[str, Any]:
    """Search for one target; what was found, timed without noise, and how good the choice of widths is."""
    generator = torch.Generator().manual_seed(seed)
    saliency = {g.name: (0.1 + torch.rand(g.units, generator=generator)) / g.units for g in work.groups}
    teacher, inputs = work.timed(work.adapter.skeleton()), work.inputs()
    noisy = copy.copy(work.clock)
    noisy.noise, noisy._random = noise, np.random.default_rng(seed)
    teacher_ms = work.clock.prepare(teacher, inputs)()
    truth: list[tuple[Keep, float]] = []

    def measure(keep: Keep) -> Comparison:
        slim = work.timed(work.slim(work.adapter.skeleton(), keep))
        truth.append((keep, work.clock.prepare(slim, inputs)() / teacher_ms))
        exact, work.clock = work.clock, noisy
        try:
            return work.compare(teacher, slim, Rounds(precision=0.004) if noise else None)
        finally:
            work.clock = exact

    proxy = load_proxy(work, "profile")
    search = BudgetSearch(
        groups=work.groups,
        saliency=saliency,
        proxy=proxy,
        policies=work.policies,
        measure=measure,
        budget=work.budget_for(ratio),
        teacher_ms=work.run.result("profile")["teacher_ms"],
        confirmations=1 if noise else 0,
    )
    found = search_export(search)
    reached = next(true for keep, true in truth if keep == found.chosen.keep)
    fastest = work.run.result("profile")["fastest_ratio"]["median"]
    record = {"target_ratio": ratio, "noise": noise, "seed": seed, "status": found.status, "reached_ratio": reached}
    record |= {"of_target": reached / ratio, "measurements": len(truth), "fastest_ratio": fastest}
    if found.status != "infeasible" and reached < (1 - TOLERANCE) * ratio:
        record["slowest_below"] = slowest_below(search, ratio, truth)
    record["kept"] = (
        fastest > ratio
        if found.status == "infeasible"
        else reached <= ratio and reached >= (1 - TOLERANCE) * record.get("slowest_below", ratio)
    )
    return record | {"of_brute_force": against_brute_force(work, saliency, ratio, seed)}


def slowest_below(search: BudgetSearch, ratio: float, truth: list[tuple[Keep, float]]) -> float:
    """The ratio of the slowest allocation under the target, whatever it is worth, as the calibrated table sees it."""
    allocation = Allocation(search.groups, search.saliency, search.proxy, search.policies[0])
    off = [true * search.teacher_ms / float(search.proxy.predict(widths_of(k, search.groups))) for k, true in truth]
    limit = ratio * search.teacher_ms / max(off)
    widths = [allocation.within(limit, share * limit) for share in np.linspace(0.9, 1.0, 41)]
    return max(float(search.proxy.predict(choice)) for choice in widths) / search.teacher_ms


def against_brute_force(work: Workspace, saliency: dict[str, torch.Tensor], ratio: float, seed: int) -> float | None:
    """Worth of the chosen widths as a fraction of the best there are, with few groups gated; None where none fits."""
    random = np.random.default_rng(seed)
    whole = Allocation(work.groups, saliency, load_proxy(work, "profile"), work.policies[-1])
    gated: list[str] = []
    for name in random.permutation(list(whole.blocks)):
        chosen = [*gated, str(name)]
        if math.prod(len(whole.allowed[block]) for block in chosen) <= ALL:
            gated = chosen
    some = {member: saliency[member] for name in gated for member in whole.blocks[name]}
    proxy = load_proxy(work, "profile")
    allocation = Allocation(work.groups, some, proxy, work.policies[-1])
    every = []
    for widths in itertools.product(*[allocation.allowed[name] for name in allocation.blocks]):
        by_block = dict(zip(allocation.blocks, widths, strict=True))
        choice = {member: by_block[name] for name, members in allocation.blocks.items() for member in members}
        if not allocation.policy.lacking(choice, work.groups):
            # What lies inside a branch or layer goes with it; nothing here lies inside anything else that thins.
            choice = {name: width if allocation._stays(name, choice) else 0 for name, width in choice.items()}
            every.append((float(proxy.predict(choice)), allocation.worth(choice)))
    low, high = min(ms for ms, _ in every), max(ms for ms, _ in every)
    limit = low + ratio * (high - low)
    best = max(worth for ms, worth in every if ms <= limit)
    return allocation.worth(allocation.within(limit)) / best


def main() -> None:
    """Solve every problem and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=14, help="for each family")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as root:
        for model in FAMILIES:
            work = profiled(model, Path(root))
            for problem in problems(arguments.problems):
                record = {"model": model} | solve(work, *problem)
                records.append(record)
                print(
                    f"{model:12} target {record['target_ratio']:.3f} noise {record['noise']:.3f}: {record['status']}, "
                    f"{record['of_target'] - 1:+.2%} of the target, {record['measurements']} measured, "
                    f"worth {record['of_brute_force']:.4f} of brute force{'' if record['kept'] else '  NOT KEPT'}",
                    flush=True,
                )
    kept = sum(record["kept"] for record in records)
    print(f"kept in {kept} of {len(records)}; least worth {min(r['of_brute_force'] for r in records):.4f}")
    record = {"environment": work.environment(), "kept": kept, "problems": records}
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["environment"]))


if __name__ == "__main__":
    main()
