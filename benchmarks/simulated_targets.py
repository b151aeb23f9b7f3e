"""Does the search keep its promise where all times are known exactly? Random problems on a simulated, noisy device.

    python benchmarks/simulated_targets.py --output benchmarks/results/simulated_targets.json

Three families, targets from 0.3 to 0.9 of the teacher's time, noise of 0 to 2 %, random importance. Every model found
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
from hawada.core.latency import Rounds
from hawada.core.search import Allocation, BudgetSearch, ImportanceObjective, reachable, search_export
from hawada.core.structure import Keep, widths_of
from hawada.core.verdict import Comparison
from hawada.experiment import Run
from hawada.experiment.results import to_json
from hawada.stages import profile
from hawada.workspace import ModelStopwatch, load_proxy, open_stage

TOLERANCE = 0.03
FAMILIES = {"tiny_resnet": [], "tiny_vit": ["export.layout=heterogeneous"], "tiny_llama": ["budget.prompt=64"]}
OPTIONS = [
    "gpu.timing=simulated",
    f"budget.tolerance={TOLERANCE}",
    "budget.batch=8",
    "runtime.threads=1",
    "profile.held_out_models=2",
]
MAX_ENUMERATED_CHOICES = 20_000  # of the widths, which brute force tries all


def profiled(model: str, root: Path) -> ModelStopwatch:
    """Profile a family on a device without noise."""
    register_resolvers()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("config", [f"model={model}", f"output_dir={root}", *OPTIONS, *FAMILIES[model]])
    run = Run(root / cfg.name, cfg)
    profile.run(run.settings("profile"), run)
    return open_stage(run.settings("export"), run)[1]


def problems(count: int) -> Iterator[tuple[float, float, int]]:
    """Draw problems as (target ratio, noise, seed)."""
    random = np.random.default_rng(0)
    for seed in range(count):
        yield float(random.uniform(0.3, 0.9)), float(random.choice([0.0, 0.005, 0.01, 0.02])), seed


def solve(watch: ModelStopwatch, ratio: float, noise: float, seed: int) -> dict[str, Any]:
    """Search for one target, time the result without noise, and compare its widths with the best possible ones."""
    generator = torch.Generator().manual_seed(seed)
    importance = {g.name: (0.1 + torch.rand(g.units, generator=generator)) / g.units for g in watch.subject.groups}
    teacher, inputs = watch.timed(watch.subject.adapter.skeleton()), watch.inputs()
    noisy = copy.copy(watch.clock)
    noisy.noise, noisy._random = noise, np.random.default_rng(seed)
    teacher_ms = watch.clock.prepare(teacher, inputs)()
    truth: list[tuple[Keep, float]] = []

    def measure(keep: Keep) -> Comparison:
        slim = watch.timed(watch.subject.slim(watch.subject.adapter.skeleton(), keep))
        truth.append((keep, watch.clock.prepare(slim, inputs)() / teacher_ms))
        exact, watch.clock = watch.clock, noisy
        try:
            return watch.compare(teacher, slim, inputs, Rounds(precision=0.004) if noise else None)
        finally:
            watch.clock = exact

    proxy = load_proxy(watch.subject, "profile")
    search = BudgetSearch(
        groups=watch.subject.groups,
        objective=ImportanceObjective(watch.subject.groups, importance),
        proxy=proxy,
        policies=watch.subject.policies,
        measure=measure,
        budget=watch.budget_for(ratio),
        teacher_ms=watch.store.run.result("profile").teacher_ms,
        confirmations=1 if noise else 0,
    )
    found = search_export(search)
    reached = next(true for keep, true in truth if keep == found.chosen.keep)
    fastest = watch.store.run.result("profile").fastest_ratio.median
    record = {"target_ratio": ratio, "noise": noise, "seed": seed, "status": found.status, "reached_ratio": reached}
    record |= {"of_target": reached / ratio, "measurements": len(truth), "fastest_ratio": fastest}
    if found.status != "infeasible" and reached < (1 - TOLERANCE) * ratio:
        record["slowest_below"] = slowest_below(search, ratio, truth)
    record["kept"] = (
        fastest > ratio
        if found.status == "infeasible"
        else reached <= ratio and reached >= (1 - TOLERANCE) * record.get("slowest_below", ratio)
    )
    return record | {"of_brute_force": against_brute_force(watch, importance, ratio, seed)}


def slowest_below(search: BudgetSearch, ratio: float, truth: list[tuple[Keep, float]]) -> float:
    """The ratio of the slowest allocation under the target, whatever its value, as the calibrated table sees it."""
    allocation = search.allocation(0)
    off = [true * search.teacher_ms / float(search.proxy.predict(widths_of(k, search.groups))) for k, true in truth]
    limit = ratio * search.teacher_ms / max(off)
    widths = [allocation.within(limit, share * limit) for share in np.linspace(0.9, 1.0, 41)]
    return max(float(search.proxy.predict(choice)) for choice in widths) / search.teacher_ms


def against_brute_force(
    watch: ModelStopwatch, importance: dict[str, torch.Tensor], ratio: float, seed: int
) -> float | None:
    """Value of the chosen widths as a fraction of the best there are, with few groups gated; None where none fits."""
    random = np.random.default_rng(seed)
    whole = Allocation(
        watch.subject.groups,
        ImportanceObjective(watch.subject.groups, importance),
        load_proxy(watch.subject, "profile"),
        watch.subject.policies[-1],
    )
    gated: list[str] = []
    for name in random.permutation(list(whole.blocks)):
        chosen = [*gated, str(name)]
        if math.prod(len(whole.allowed[block]) for block in chosen) <= MAX_ENUMERATED_CHOICES:
            gated = chosen
    some = {member: importance[member] for name in gated for member in whole.blocks[name]}
    proxy = load_proxy(watch.subject, "profile")
    allocation = Allocation(
        watch.subject.groups, ImportanceObjective(watch.subject.groups, some), proxy, watch.subject.policies[-1]
    )
    every = []
    for widths in itertools.product(*[allocation.allowed[name] for name in allocation.blocks]):
        by_block = dict(zip(allocation.blocks, widths, strict=True))
        choice = {member: by_block[name] for name, members in allocation.blocks.items() for member in members}
        if not allocation.policy.missing_kinds(choice, watch.subject.groups):
            # What lies inside a branch or layer goes with it; nothing here lies inside anything else that is pruned.
            inside = reachable(watch.subject.groups, choice)
            choice = {name: width if name in inside else 0 for name, width in choice.items()}
            every.append((float(proxy.predict(choice)), allocation.value(choice)))
    low, high = min(ms for ms, _ in every), max(ms for ms, _ in every)
    limit = low + ratio * (high - low)
    best = max(value for ms, value in every if ms <= limit)
    return allocation.value(allocation.within(limit)) / best


def main() -> None:
    """Solve every problem and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=14, help="number of problems for each family")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as root:
        for model in FAMILIES:
            watch = profiled(model, Path(root))
            for problem in problems(arguments.problems):
                record = {"model": model} | solve(watch, *problem)
                records.append(record)
                print(
                    f"{model:12} target {record['target_ratio']:.3f} noise {record['noise']:.3f}: {record['status']}, "
                    f"{record['of_target'] - 1:+.2%} of the target, {record['measurements']} measured, "
                    f"value {record['of_brute_force']:.4f} of brute force{'' if record['kept'] else '  NOT KEPT'}",
                    flush=True,
                )
    kept = sum(record["kept"] for record in records)
    print(f"kept in {kept} of {len(records)}; least value {min(r['of_brute_force'] for r in records):.4f}")
    record = {"environment": to_json(watch.store.environment), "kept": kept, "problems": records}
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["environment"]))


if __name__ == "__main__":
    main()
