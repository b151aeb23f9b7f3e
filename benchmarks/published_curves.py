"""How well does a small table predict times on real GPUs? It is built from a few published times and predicts the rest.

    python benchmarks/published_curves.py --data FOLDER --output benchmarks/results/published_curves.json

FOLDER holds `*__mlp.csv.gz` of microsoft/vidur (Agrawal et al., Vidur, 2024): milliseconds of the operators of language
models on H100 and A100, by number of tokens and degree of tensor parallelism. For every curve (file, operator, degree)
the site table takes a few points, each chosen by the times of those before, and predicts all others.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from hawada.core.latency import environment
from hawada.core.latency.site_table import SiteTable, monotone
from hawada.core.structure import Site

MAX_MEDIAN_ERROR = 0.03  # of a curve that counts as within the aim
RESOLUTION_MS = 0.001  # the published times are whole microseconds


def read_curves(file: Path, max_tokens: int) -> dict[tuple[str, int], dict[int, float]]:
    """Read milliseconds by tokens for each (operator, degree); the median where a number of tokens was timed twice."""
    with gzip.open(file, "rt") as opened:
        rows = list(csv.DictReader(opened))
    samples: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        tokens, degree = int(row["num_tokens"]), int(row["num_tensor_parallel_workers"])
        for column, value in row.items():
            _, _, measured = column.partition("time_stats.")
            operator, _, statistic = measured.partition(".")
            if statistic == "median" and value and tokens <= max_tokens:
                samples[operator, degree][tokens].append(float(value))
    return {key: {n: float(np.median(ms)) for n, ms in sorted(curve.items())} for key, curve in samples.items()}


def choose_points(candidates: Sequence[int], count: int, measure: Callable[[int], float]) -> dict[int, float]:
    """Take both ends, and then repeatedly the middle of the interval that may hide the largest differences.

    An interval may hide the relative difference of its ends at each of the candidates inside it, so stairs and slopes
    get more points than plateaus. Only the points that are returned are measured.
    """
    taken = {index: measure(candidates[index]) for index in (0, len(candidates) - 1)}
    while len(taken) < min(count, len(candidates)):
        known = sorted(taken)
        intervals = [(left, right) for left, right in pairwise(known) if right - left > 1]

        def hidden(interval: tuple[int, int]) -> float:
            left, right = interval
            return abs(taken[left] - taken[right]) / max(taken[left], taken[right]) * (right - left - 1)

        left, right = max(intervals, key=hidden)
        taken[(left + right) // 2] = measure(candidates[(left + right) // 2])
    return {candidates[index]: taken[index] for index in sorted(taken)}


def spread_points(candidates: Sequence[int], count: int, measure: Callable[[int], float]) -> dict[int, float]:
    """Take the same number of points at even distances, as a baseline."""
    even = np.linspace(candidates[0], candidates[-1], count)
    return {n: measure(n) for n in sorted({min(candidates, key=lambda n: abs(n - aim)) for aim in even})}


def left_out_errors(operator: str, curve: dict[int, float], points: dict[int, float]) -> np.ndarray:
    """Compute the relative errors of a table of `points` on the rest of the curve."""
    ms = monotone(np.asarray(list(points.values())))
    table = SiteTable(Site(operator, ("tokens",), "published"), (tuple(points),), ms)
    rest = [n for n in curve if n not in points]
    return np.asarray([abs(float(table.interpolate({"tokens": n})) / curve[n] - 1) for n in rest])


def describe(errors: Sequence[np.ndarray]) -> dict[str, float | int]:
    """Summarize errors over all points of some curves, and over the curves."""
    medians = np.asarray([np.median(own) for own in errors])
    return {
        "median_error": float(np.median(np.concatenate(list(errors)))),
        "median_of_curves": float(np.median(medians)),
        "worst_curve": float(medians.max()),
        "curves": len(medians),
        "curves_within_aim": int((medians <= MAX_MEDIAN_ERROR).sum()),
    }


def evaluate_curve(
    file: str, operator: str, degree: int, curve: dict[int, float], count: int
) -> tuple[dict, list[np.ndarray]]:
    """Make one curve's record, and compute the errors with chosen points and with points at even distances."""
    points, even = (choose(list(curve), count, curve.__getitem__) for choose in (choose_points, spread_points))
    chosen, spread = (left_out_errors(operator, curve, taken) for taken in (points, even))
    entry = {
        "file": file,
        "operator": operator,
        "tensor_parallel": degree,
        "points": list(points),
        "left_out": len(chosen),
        "median_error": float(np.median(chosen)),
        "p90_error": float(np.percentile(chosen, 90)),
        "median_error_even": float(np.median(spread)),
        "rounding": RESOLUTION_MS / 2 / float(np.median(list(curve.values()))),
    }
    name = f"{file.removesuffix('__mlp.csv.gz')} {operator} tp{degree}"
    print(
        f"{name:75} {len(points):6} {entry['left_out']:5} {entry['median_error']:7.2%} {entry['p90_error']:7.2%} "
        f"{entry['rounding']:8.2%}{'' if entry['median_error'] <= MAX_MEDIAN_ERROR else '  above the aim'}"
    )
    return entry, [chosen, spread]


def summarize(curves: Sequence[dict], errors: Sequence[list[np.ndarray]]) -> dict[str, dict]:
    """Summarize all curves, matrix products, other operators, and points at even distances; print it too."""
    products = ["proj" in entry["operator"] for entry in curves]
    parts = {
        "all curves": [chosen for chosen, _ in errors],
        "matrix products": [chosen for (chosen, _), product in zip(errors, products, strict=True) if product],
        "other operators": [chosen for (chosen, _), product in zip(errors, products, strict=True) if not product],
        "all curves, points at even distances": [spread for _, spread in errors],
    }
    summary = {name: describe(own) for name, own in parts.items()}
    for name, found in summary.items():
        print(
            f"{name}: median error {found['median_error']:.2%}, median of the curves' medians "
            f"{found['median_of_curves']:.2%}, worst curve {found['worst_curve']:.2%}, "
            f"{found['curves_within_aim']} of {found['curves']} curves within {MAX_MEDIAN_ERROR:.0%}"
        )
    return summary


def main() -> None:
    """Print every curve, whether it is within the aim, and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the published times")
    parser.add_argument("--points", type=int, default=16, help="most points that a curve's table is built from")
    parser.add_argument("--max-tokens", type=int, default=4096, help="longer inputs are left out")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    files = sorted(arguments.data.glob("*__mlp.csv.gz"))
    if not files:
        parser.error(f"{arguments.data} holds no *__mlp.csv.gz; give the folder of the published times")
    print(f"{'curve':75} {'points':>6} {'rest':>5} {'median':>7} {'p90':>7} {'rounding':>8}")
    evaluated = [
        evaluate_curve(file.name, operator, degree, curve, arguments.points)
        for file in files
        for (operator, degree), curve in read_curves(file, arguments.max_tokens).items()
    ]
    curves = [entry for entry, _ in evaluated]
    summary = summarize(curves, [errors for _, errors in evaluated])
    machine = environment(torch.device("cpu"))
    print(json.dumps(machine))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        options = {"points": arguments.points, "max_tokens": arguments.max_tokens, "aim": MAX_MEDIAN_ERROR}
        record = {"environment": machine, **options, "summary": summary, "curves": curves}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
