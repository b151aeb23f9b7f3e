"""What each step is worth: of gates, of the export, and of finetuning, one change at a time.

    python benchmarks/quality_steps.py --data cifar10_jpeg75 --weights resnet20_jpeg75.safetensors \\
        --output benchmarks/results/quality_steps_resnet20_cpu.json

The machine is measured once; after that widths are chosen by that table, so that all steps are compared at the same
predicted latency. They are judged on 5,120 training images that nothing else has seen, except the teacher; test images
have no part in it. Prints the tables of docs/quality.md. Needs the extra `bench` for what it shares with
equal_latency.py.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import CALIBRATION
from equal_latency import HIDDEN_WEIGHT, finetuned, network_parser, options, recipe, unaugmented, workspace
from torch import nn

from hawada.core.evaluate import score
from hawada.core.finetune import recalibrate_batchnorm
from hawada.data.vision import cifar10
from hawada.stages import front
from hawada.stages.workspace import Workspace

HELD_OUT = 5120  # training images
TRAINED = ["train.epochs=10", "train.steps_per_epoch=10", "train.patience=0"]  # of gates, at batch 64: 6,400 images
ALONE = ["export.quality.worth=gates", "export.quality.compensate=false"]  # gates decide everything
FISHER = "train.importance.samples=2048"
STEPS: dict[str, list[str]] = {
    "sigmoid gates, trained": [*TRAINED, *ALONE],
    "not trained, begun by Fisher information": [FISHER, *ALONE],
    "begun by Fisher information": [*TRAINED, *ALONE, FISHER],
    "temperature annealed": [*TRAINED, *ALONE, "gate=annealed"],
    "both": [*TRAINED, *ALONE, "gate=annealed", FISHER],
    "straight-through, begun by Fisher information": [
        *TRAINED,
        *ALONE,
        "gate._target_=tried_gates.StraightThroughGate",
        FISHER,
    ],
    "hard-concrete": [*TRAINED, *ALONE, "gate=hard_concrete"],
    "polarization penalty": [*TRAINED, *ALONE, "penalties.polarization=1"],
    "sigmoid gates, trained; readers refitted": [*TRAINED, "export.quality.worth=gates"],
    "sigmoid gates, trained; readers refitted, worths measured": TRAINED,
    "no gates trained; readers refitted, worths measured, order by reconstruction": [
        "export.quality.order=reconstruction"
    ],
}
FINETUNING: dict[str, tuple[bool, float]] = {  # augmented, weight of blocks; of what the last step made
    "answers distilled, images augmented": (True, 0.0),
    "blocks distilled too": (True, HIDDEN_WEIGHT),
    "images as they are": (False, 0.0),
    "both": (False, HIDDEN_WEIGHT),
}


def held_out(data: Path) -> list[Any]:
    """Batches of the training images that `data.samples` leaves out, without augmentation."""
    plain: Any = cifar10(str(data)).plain
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))
    return [plain.__getitems__(rows.tolist()) for rows in order[-HELD_OUT:].split(512)]


def accuracy(work: Workspace, model: nn.Module, batches: Sequence[Any]) -> float:
    """In percent."""
    return 100 * score(model, batches, work.adapter.logits).accuracy


def sliced(name: str, work: Workspace, batches: Sequence[Any]) -> list[dict[str, Any]]:
    """Accuracy at every target before any finetuning."""
    points = (work.run.result("front") if work.run.check("front") else front.run(work.cfg, work.run))["points"]
    records: list[dict[str, Any]] = []
    for point in points:
        target, reached = point["target_ratio"], point["status"] != "infeasible"
        records.append({"step": name, "target_ratio": target, "reached": reached})
        if reached:
            model = work.saved_model("front", f"{target:g}/slim")
            exported = accuracy(work, model, batches)
            recalibrate_batchnorm(model, work.data.calibration_loader(128, CALIBRATION))
            records[-1] |= {
                "predicted_ratio": point["measured"]["ratio"]["median"],
                "exported": exported,
                "recalibrated": accuracy(work, model, batches),
                "widths": point["widths"],
            }
    return records


def finetuning(
    name: str, work: Workspace, target: float, samples: int, seeds: int, batches: Sequence[Any]
) -> dict[str, Any]:
    """Accuracy after one way of finetuning an exported model."""
    augmented, weight = FINETUNING[name]
    teacher, model = work.teacher(), work.saved_model("front", f"{target:g}/slim")
    recalibrate_batchnorm(model, work.data.calibration_loader(128, CALIBRATION))
    data = work.data if augmented else unaugmented(work.data)
    found = [
        accuracy(work, finetuned(work, model, teacher, data, samples, seed, weight), batches) for seed in range(seeds)
    ]
    return {"step": name, "target_ratio": target, "augmented": augmented, "hidden_weight": weight, "finetuned": found}


def table(rows: Mapping[str, Sequence[str]], head: Sequence[str]) -> str:
    """As Markdown."""
    lines = [["", *head], ["---"] * (len(head) + 1), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(record: Mapping[str, Any]) -> str:
    """Accuracy as exported, and with BatchNorm recalibrated."""
    return f"{record['exported']:.1f} / {record['recalibrated']:.1f}" if record["reached"] else "not reached"


def mean_and_deviation(values: Sequence[float]) -> str:
    """Of several seeds; one seed deviates from nothing."""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def main() -> None:
    """Judge every step, write the figures and print the tables."""
    parser = network_parser(str(__doc__))
    parser.add_argument("--seeds", type=int, default=3, help="of finetuning")
    parser.add_argument("--samples", type=int, default=30_000, help="training images of finetuning and refit together")
    parser.add_argument("--root", type=Path, help="folder that keeps the runs; a temporary one if left out")
    arguments = parser.parse_args()
    base = [*options(arguments), "export.quality.order=gates", f"data.samples={50_000 - HELD_OUT}"]
    base += arguments.overrides
    batches = held_out(arguments.data)
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.root or Path(temporary)
        first = workspace(base, arguments.targets, root / "measured")
        latencies = first.run.folder("profile") / "latency_table.json"
        print("everything is measured; what follows may share the machine", flush=True)
        whole: dict[str, Any] = {
            "environment": first.environment(),
            "timed_as": first.timed_as,
            "held_out": HELD_OUT,
            "teacher_accuracy": accuracy(first, first.teacher(), batches),
            "recipe": {key: value for key, value in recipe().items() if key not in ("augmentation", "hidden_weight")},
            "samples": arguments.samples,
            "records": [],
            "finetuning": [],
        }

        def keep(key: str, records: list[dict[str, Any]]) -> None:
            whole[key] += records
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(whole, indent=1) + "\n")

        for name, overrides in STEPS.items():
            chosen = [*base, "gpu.timing=table", f"gpu.table={latencies}", *overrides]
            work = workspace(chosen, arguments.targets, root / re.sub(r"\W+", "_", name))
            keep("records", sliced(name, work, batches))
        for name in FINETUNING:
            ready = (arguments.samples - CALIBRATION, arguments.seeds, batches)
            keep("finetuning", [finetuning(name, work, max(arguments.targets), *ready)])
    rows = {name: [cell(r) for r in whole["records"] if r["step"] == name] for name in STEPS}
    print(table(rows, [f"at {record['target_ratio']:g}" for record in whole["records"][: len(arguments.targets)]]))
    ways = {way["step"]: [mean_and_deviation(way["finetuned"])] for way in whole["finetuning"]}
    print(table(ways, [f"at {max(arguments.targets):g}"]))


if __name__ == "__main__":
    main()
