"""Facts through latents: what two frozen language models recall from them, beside text and other baselines.

    python benchmarks/interlingua_recall.py --root outputs/recall --jobs 2 \\
        --output benchmarks/results/interlingua_recall_cpu.json

Contexts are N facts "key value", latents are N (half of the tokens of the model that needs fewer), the encoder does not
see the question, and test contexts are made of pairs that training never shows. The two models are trained once. Every
N, injection and seed then has an encoder and adapters of its own, and so has every change of the configuration that
`--variants` names, at `--variant-pairs` facts and with the first injection and seed.

`--root` keeps all runs: what is finished there is not done again, and all that is there is in the file: the work can
be done in several calls. Trainings run side by side, evaluations one after another, as they take times. Overrides
for the runs of a call go after `--`, e.g. `-- evaluate.prompt_steps=1000`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from hawada.core.files import partial_path

ROWS = ("text", "shuffled latents", "zero latents", "prompt tuning", "head", "tail", "random tokens", "nothing")
PLAIN = "as configured"
VARIANTS: dict[str, list[str]] = {
    "encoder of bytes": ["interlingua.encoder_type=bytes"],
    "encoder on hidden states": ["interlingua.encoder_type=states"],
    "no transformer in the encoder": ["interlingua.encoder.layers=0"],
    "pooling by learned queries": ["interlingua.pooling._target_=hawada.interlingua.pooling.LearnedQueries"],
    "curriculum": ["interlingua.schedule.curriculum=0.5"],
    "hidden states distilled": ["interlingua.objective.kd_hidden_weight=1"],
    "query-aware": ["interlingua.query_aware=true"],
}
JOB = "job.json"  # in the folder of each run: what it is
SCRIPT = "import os, sys; os.sched_setaffinity(0, [{cpu}]); from hawada.cli import main; sys.argv[0] = 'hawada'; main()"


@dataclass(frozen=True)
class Job:
    """One run."""

    variant: str
    injection: str
    pairs: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.variant.replace(' ', '_')}-{self.injection}-{self.pairs}-{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """Its configuration."""
        return [
            f"name={self.name}",
            "data=recall",
            f"data.pairs={self.pairs}",
            f"interlingua.latent_len={self.pairs}",
            f"interlingua.injection={self.injection}",
            f"interlingua.seed={self.seed}",
            *VARIANTS.get(self.variant, []),
        ]


def wanted(arguments: argparse.Namespace) -> list[Job]:
    """What is asked for."""
    grid = product(arguments.injections, arguments.pairs, arguments.seeds)
    jobs = [Job(PLAIN, *combination) for combination in grid]
    injection, seed = arguments.injections[0], arguments.seeds[0]
    return jobs + [Job(variant, injection, arguments.variant_pairs, seed) for variant in arguments.variants]


def hawada(arguments: argparse.Namespace, stage: str, overrides: Sequence[str]) -> None:
    """One stage by the command, on a CPU of its own.

    Raises:
        RuntimeError: when it fails.
    """
    fixed = [f"stage={stage}", f"output_dir={arguments.root.resolve()}", *overrides, *arguments.overrides]
    cpu = arguments.cpus.get()
    try:
        command = [sys.executable, "-c", SCRIPT.format(cpu=cpu), *fixed]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    finally:
        arguments.cpus.put(cpu)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise RuntimeError(f"stage={stage} {' '.join(overrides)}: {said[-1]}")
    print(done.stdout.strip().splitlines()[-1], flush=True)


def train(arguments: argparse.Namespace, job: Job) -> None:
    """A run with the models that are trained already.

    Raises:
        RuntimeError: when the folder has a run with other overrides.
    """
    folder = arguments.root / job.name
    mine = {"job": asdict(job), "overrides": arguments.overrides}
    if not (folder / JOB).is_file():
        if not finished(folder, "interlingua-llms"):
            copy_new(arguments.root / "models" / "interlingua-llms", folder / "interlingua-llms")
        (folder / JOB).write_text(json.dumps(mine))
    if json.loads((folder / JOB).read_text()) != mine:
        raise RuntimeError(f"{folder} has a run with other overrides; give another --root")
    if not finished(folder, "interlingua"):
        hawada(arguments, "interlingua", job.overrides)


def copy_new(source: Path, target: Path) -> None:
    """Copy a folder, whole or not at all, to where nothing is yet.

    Raises:
        RuntimeError: when something is there.
    """
    if os.path.lexists(target):
        raise RuntimeError(f"{target} exists and is not what this benchmark copied; give another --root")
    partial = partial_path(target)
    shutil.copytree(source, partial)
    os.rename(partial, target)


def finished(folder: Path, stage: str) -> bool:
    """Whether a stage has its result."""
    return (folder / stage / "manifest.json").is_file()


def collect(root: Path) -> list[dict[str, Any]]:
    """One record for each variant, injection and N that was evaluated, with the figures of all seeds."""
    evaluated = (path.parent for path in root.glob(f"*/{JOB}") if finished(path.parent, "interlingua-eval"))
    described = {folder: json.loads((folder / JOB).read_text()) for folder in evaluated}
    jobs = {Job(**text["job"]): folder for folder, text in described.items()}

    def kind(job: Job) -> tuple[bool, str, str, int]:
        return job.variant != PLAIN, job.variant, job.injection, job.pairs

    records = []
    for _, group in groupby(sorted(jobs, key=lambda job: (*kind(job), job.seed)), kind):
        own = list(group)
        results = [read(jobs[job] / "interlingua-eval") for job in own]
        trained = [read(jobs[job] / "interlingua") for job in own]
        records.append(
            {
                "variant": own[0].variant,
                "injection": own[0].injection,
                "pairs": own[0].pairs,
                "seeds": [job.seed for job in own],
                "overrides": described[jobs[own[0]]]["overrides"],
                "parameters": trained[0]["parameters"],
                "questions": results[0]["questions"],
                "guessing": results[0]["guessing"],
                "payload_bytes": results[0]["payload_bytes"],
                "together": [result["together"] for result in results],
                "models": {name: of_model(name, results) for name in results[0]["models"]},
            }
        )
    return records


def read(folder: Path) -> Any:
    """A stage's result."""
    return json.loads((folder / "result.json").read_text())


def of_model(name: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What one model answered with each seed."""
    own = [result["models"][name] for result in results]
    return {
        "context_tokens": own[0]["context_tokens"],
        "em": {row: [model["rows"][row]["em"] for model in own] for row in own[0]["rows"]},
        "nll": {row: [model["rows"][row]["nll"] for model in own] for row in own[0]["rows"]},
        "latents_minus": [model["latents_minus"] for model in own],
        "cache_bytes_saved": own[0]["cache_bytes_saved"],
        "prefill": [model["prefill"] for model in own],
    }


def lines(record: dict[str, Any]) -> Iterable[str]:
    """A record in words: mean exact match over seeds, the smallest of latents in brackets."""
    for name, model in record["models"].items():
        em = {row: np.mean(values) for row, values in model["em"].items()}
        others = ", ".join(f"{row} {em[row]:.3f}" for row in ROWS if row in em)
        yield (
            f"{record['variant']}, N={record['pairs']} {record['injection']:5} {name:6} {record['pairs']} latents for "
            f"{model['context_tokens']:.0f} tokens: EM {em['latents']:.3f} "
            f"(worst of {len(record['seeds'])}: {min(model['em']['latents']):.3f}); {others}; "
            f"values without keys {record['guessing']['values without keys']:.2f}"
        )


def main() -> None:
    """Train, evaluate, and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--injections", nargs="+", default=["keys", "soft"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=[])
    parser.add_argument("--variant-pairs", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, each on a CPU of its own")
    parser.add_argument("--root", type=Path, required=True, help="folder that keeps all runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", help="further hawada overrides, after --")
    arguments = parser.parse_args()
    arguments.overrides = ["runtime.threads=1", *arguments.overrides]
    arguments.cpus = SimpleQueue()
    for cpu in sorted(os.sched_getaffinity(0)):
        arguments.cpus.put(cpu)
    start = time.perf_counter()
    if not finished(arguments.root / "models", "interlingua-llms"):
        hawada(arguments, "interlingua-llms", ["name=models"])
    jobs = wanted(arguments)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda job: train(arguments, job), jobs))
    for job in jobs:
        if not finished(arguments.root / job.name, "interlingua-eval"):
            hawada(arguments, "interlingua-eval", job.overrides)
    records = collect(arguments.root)
    environment = read(arguments.root / jobs[0].name / "interlingua-eval")["environment"]
    whole = {
        "environment": environment,
        "models": read(arguments.root / "models" / "interlingua-llms"),
        "seconds_of_last_call": time.perf_counter() - start,
        "records": records,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(whole, indent=1) + "\n")
    print("\n".join(line for record in records for line in lines(record)))
    print(json.dumps(environment))


if __name__ == "__main__":
    main()
