"""Does the measured slim model meet its budget? Runs whole pipelines and lists ratio, interval, accuracy and time.

    python benchmarks/budget_met.py --ratios 0.7 0.5 --seeds 0 1 2 --output benchmarks/results/budget_met_cpu.json

Each run is `hawada budget.target_ratio=R seed=S` in a directory of its own; further overrides go after `--`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(ratio: float, seed: int, root: Path, overrides: list[str]) -> dict:
    """Run one pipeline and return its result with the wall time; where there is no result, exit with the error."""
    name = f"ratio{ratio}-seed{seed}"
    command = [
        "hawada",
        f"budget.target_ratio={ratio}",
        f"seed={seed}",
        f"name={name}",
        f"output_dir={root}",
        *overrides,
    ]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    path = root / name / "result.json"
    if not path.is_file():
        sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()}")
    result = json.loads(path.read_text())
    return {
        "target_ratio": ratio,
        "seed": seed,
        "exit_code": done.returncode,
        "seconds": round(seconds, 1),
        "verdict": result["verdict"],
        "latency_ratio": result["latency_ratio"],
        "of_target": result["latency_ratio"]["median"] / ratio,
        "teacher": {key: result["teacher"][key] for key in ("latency_ms", "params", "macs", "accuracy")},
        "slim": {key: result["slim"][key] for key in ("latency_ms", "params", "macs", "accuracy")},
        "agreement": result["agreement"],
        "proxy": result["proxy"],
        "equivalence": result["equivalence"],
        "environment": result["environment"],
    }


def main() -> None:
    """Run every combination of target and seed and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", help="further hawada overrides")
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as root:
        for ratio in arguments.ratios:
            for seed in arguments.seeds:
                record = run(ratio, seed, Path(root), arguments.overrides)
                environment = record.pop("environment")
                runs.append(record)
                interval = record["latency_ratio"]
                print(
                    f"target {ratio:.2f} seed {seed}: {record['verdict']}, ratio {interval['median']:.3f} "
                    f"[{interval['low']:.3f}, {interval['high']:.3f}], {record['of_target'] - 1:+.1%} of the target, "
                    f"accuracy {record['teacher']['accuracy']:.2%} -> {record['slim']['accuracy']:.2%}, "
                    f"{record['seconds']:.0f} s",
                    flush=True,
                )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"environment": environment, "runs": runs}, indent=1) + "\n")
    print(json.dumps(environment))


if __name__ == "__main__":
    main()
