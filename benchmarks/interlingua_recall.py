"""Facts through soft tokens: what two frozen language models recall from latents, beside text and other baselines.

    python benchmarks/interlingua_recall.py --root outputs --output benchmarks/results/interlingua_recall_cpu.json

Contexts are N facts "key value", latents are N (half of the tokens of the model that needs fewer), the encoder does not
see the question, and test contexts are made of pairs that training never shows. The two models are trained once; every
combination of N, injection and seed then trains an encoder and adapters of its own. `--root` keeps all runs: what is
finished there is not done again. Further overrides go after `--`, e.g. `-- feature=reconstruction`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

ROWS = (
    "text",
    "latents",
    "shuffled latents",
    "zero latents",
    "prompt tuning",
    "head",
    "tail",
    "random tokens",
    "nothing",
)
COMMAND = [sys.executable, "-c", "import sys; from hawada.cli import main; sys.argv[0] = 'hawada'; main()"]


def swept(values: list[Any]) -> str:
    """As Hydra's sweeper takes them."""
    return ",".join(map(str, values))


def run(stage: str, arguments: argparse.Namespace) -> None:
    """One multirun over everything that is asked for; jobs share the trained models.

    Raises:
        RuntimeError: when a job fails.
    """
    sweep = [
        f"data.pairs={swept(arguments.pairs)}",
        f"interlingua.injection={swept(arguments.injections)}",
        f"interlingua.seed={swept(arguments.seeds)}",
    ]
    fixed = ["data=recall", "interlingua.latent_len=${data.pairs}", f"output_dir={arguments.root.resolve()}"]
    if subprocess.run([*COMMAND, "-m", f"stage={stage}", *sweep, *fixed, *arguments.overrides]).returncode:
        raise RuntimeError(f"stage={stage} failed; the runs in {arguments.root} tell why")


def job(arguments: argparse.Namespace, pairs: int, injection: str, seed: int) -> str:
    """The folder of one job: it is named by the keys of which there are several values."""
    asked = (arguments.pairs, arguments.injections, arguments.seeds)
    keys = ("data.pairs", "interlingua.injection", "interlingua.seed")
    chosen = zip(keys, asked, (pairs, injection, seed), strict=True)
    return ",".join(f"{key}={value}" for key, values, value in chosen if len(values) > 1)


def collect(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each combination of N and injection, with the figures of all its seeds."""
    records = []
    for pairs, injection in product(arguments.pairs, arguments.injections):
        runs = [arguments.root / "interlingua" / job(arguments, pairs, injection, seed) for seed in arguments.seeds]
        evaluated = [json.loads((path / "interlingua-eval" / "result.json").read_text()) for path in runs]
        trained = [json.loads((path / "interlingua" / "result.json").read_text()) for path in runs]
        records.append(
            {
                "pairs": pairs,
                "injection": injection,
                "training_seconds": [result["seconds"] for result in trained],
                "parameters": trained[0]["parameters"],
                "guessing": evaluated[0]["guessing"],
                "payload_bytes": evaluated[0]["payload_bytes"],
                "together": [result["together"] for result in evaluated],
                "models": {name: of_model(name, evaluated) for name in evaluated[0]["models"]},
            }
        )
    return records


def of_model(name: str, evaluated: list[dict[str, Any]]) -> dict[str, Any]:
    """What one model answered with each seed."""
    own = [result["models"][name] for result in evaluated]
    return {
        "context_tokens": own[0]["context_tokens"],
        "em": {row: [model["rows"][row]["em"] for model in own] for row in own[0]["rows"]},
        "latents_minus": [model["latents_minus"] for model in own],
        "prefill": [model["prefill"] for model in own],
    }


def lines(record: dict[str, Any]) -> list[str]:
    """A record in words: mean exact match over seeds, the smallest of latents in brackets."""
    found = []
    for name, model in record["models"].items():
        em = {row: np.mean(values) for row, values in model["em"].items()}
        worst = min(model["em"]["latents"])
        others = ", ".join(f"{row} {em[row]:.3f}" for row in ROWS if row != "latents")
        found.append(
            f"N={record['pairs']} {record['injection']:5} {name:6} {record['pairs']} latents for "
            f"{model['context_tokens']:.0f} tokens: EM {em['latents']:.3f} (worst seed {worst:.3f}); {others}; "
            f"guessing a value {record['guessing']['values without keys']:.2f}"
        )
    return found


def main() -> None:
    """Train, evaluate, and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--injections", nargs="+", default=["soft", "keys"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", type=Path, required=True, help="folder that keeps all runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", help="further hawada overrides, after --")
    arguments = parser.parse_args()
    start = time.perf_counter()
    for stage in ("interlingua", "interlingua-eval"):
        run(stage, arguments)
    records = collect(arguments)
    shared = arguments.root / "interlingua" / "interlingua-llms"
    environment = json.loads(next(arguments.root.rglob("interlingua-eval/result.json")).read_text())["environment"]
    whole = {
        "environment": environment,
        "overrides": arguments.overrides,
        "models": json.loads((shared / "result.json").read_text()),
        "seconds": time.perf_counter() - start,
        "records": records,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(whole, indent=1) + "\n")
    print("\n".join(line for record in records for line in lines(record)))
    print(json.dumps(environment))


if __name__ == "__main__":
    main()
