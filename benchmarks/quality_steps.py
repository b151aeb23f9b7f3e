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
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import CALIBRATION
from equal_latency import HIDDEN_WEIGHT, finetuned, network_parser, options, recipe, workspace
from torch import nn

from hawada.core.evaluate import score
from hawada.core.finetune import recalibrate_batchnorm
from hawada.data.vision import ImageTensors, VisionData
from hawada.stages import front
from hawada.stages.workspace import Workspace

HELD_OUT = 5120  # training images
TRAINED = ["train.epochs=10", "train.steps_per_epoch=10", "train.patience=0"]  # of gates, at batch 64: 6,400 images
ALONE = ["export.quality.worth=gates", "export.quality.compensate=false"]  # gates decide everything
BEST = ["export.quality.order=reconstruction"]
STEPS: dict[str, list[str]] = {
    "sigmoid gates, trained": [*TRAINED, *ALONE],
    "- trained: they begin by Fisher information": ["train.importance.samples=2048", *ALONE],
    "+ they begin by Fisher information": [*TRAINED, *ALONE, "train.importance.samples=2048"],
    "+ temperature annealed": [*TRAINED, *ALONE, "gate=annealed"],
    "straight-through instead": [*TRAINED, *ALONE, "gate=straight_through"],
    "hard-concrete instead": [*TRAINED, *ALONE, "gate=hard_concrete"],
    "+ polarization penalty": [*TRAINED, *ALONE, "penalties.polarization=1"],
    "+ least squares": [*TRAINED, "export.quality.worth=gates"],
    "+ least squares, measured worth": TRAINED,
    "no gates trained, least squares, measured worth, order by reconstruction": BEST,
}
FINETUNING: dict[str, dict[str, Any]] = {  # of what the last step made
    "distillation of answers, augmented": {"hidden_weight": 0.0, "augmented": True},
    "+ of blocks": {"augmented": True},
    "- augmentation": {"hidden_weight": 0.0},
    "+ of blocks, - augmentation": {},
}


class Images:
    """Of the training images: those that nothing is trained or calibrated on, and the others.

    Attributes:
        held_out: batches (images, labels).
        plain: the others, as they are.
        augmented: the same, augmented.
    """

    def __init__(self, data: VisionData) -> None:
        plain: Any = data.plain
        order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))  # calibration takes the first
        mine = order[CALIBRATION : CALIBRATION + HELD_OUT]
        others = torch.cat([order[:CALIBRATION], order[CALIBRATION + HELD_OUT :]])
        self.held_out = [plain.__getitems__(rows.tolist()) for rows in mine.split(512)]
        self.plain, self.augmented = self._of(plain, others), self._of(data.train, others)

    @staticmethod
    def _of(source: Any, rows: torch.Tensor) -> VisionData:
        """Some of the images, as training data."""
        chosen = ImageTensors(
            source.images[rows], source.labels[rows], mean=(0, 0, 0), std=(1, 1, 1), augment=source.augment
        )
        chosen.mean, chosen.std = source.mean, source.std
        return VisionData(chosen, chosen, chosen, classes=10)

    def accuracy(self, work: Workspace, model: nn.Module) -> float:
        """On what was held out, in percent."""
        return 100 * score(model, self.held_out, work.adapter.logits).accuracy


def sliced(
    name: str, overrides: Sequence[str], targets: Sequence[float], root: Path, images: Images
) -> tuple[Workspace, list[dict[str, Any]]]:
    """Accuracy at every target with some of the settings, before any finetuning."""
    work = workspace(overrides, targets, root)
    records = []
    for point in front.run(work.cfg, work.run)["points"]:
        records.append(
            {"step": name, "target_ratio": point["target_ratio"], "reached": point["status"] != "infeasible"}
        )
        if not records[-1]["reached"]:
            continue
        model = work.saved_model("front", f"{point['target_ratio']:g}/slim")
        exported = images.accuracy(work, model)
        recalibrate_batchnorm(model, work.data.calibration_loader(128, CALIBRATION))
        records[-1] |= {
            "predicted_ratio": point["measured"]["ratio"]["median"],
            "exported": exported,
            "recalibrated": images.accuracy(work, model),
            "widths": point["widths"],
        }
    return work, records


def finetuning(work: Workspace, target: float, samples: int, seeds: int, images: Images) -> list[dict[str, Any]]:
    """Accuracy after each way of finetuning one exported model."""
    teacher, model = work.teacher(), work.saved_model("front", f"{target:g}/slim")
    records = []
    for name, changes in FINETUNING.items():
        data = images.augmented if changes.get("augmented") else images.plain
        weight = changes.get("hidden_weight", HIDDEN_WEIGHT)
        found = [
            images.accuracy(work, finetuned(work, model, teacher, data, samples, seed, weight)) for seed in range(seeds)
        ]
        records.append({"step": name, "target_ratio": target, "hidden_weight": weight, "finetuned": found})
        print(f"{name:40} {np.mean(found):5.2f} %  {found}", flush=True)
    return records


def table(rows: Mapping[str, Sequence[str]], head: Sequence[str]) -> str:
    """As Markdown."""
    lines = [["", *head], ["---"] * (len(head) + 1), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(record: Mapping[str, Any]) -> str:
    """Accuracy as exported, and with BatchNorm recalibrated."""
    return f"{record['exported']:.1f} / {record['recalibrated']:.1f}" if record["reached"] else "not reached"


def main() -> None:
    """Judge every step, write the figures and print the tables."""
    parser = network_parser(str(__doc__))
    parser.add_argument("--seeds", type=int, default=3, help="of finetuning")
    parser.add_argument("--samples", type=int, default=30_000, help="training images of finetuning and refit together")
    parser.add_argument("--root", type=Path, help="folder that keeps the runs; a temporary one if left out")
    arguments = parser.parse_args()
    base = [*options(arguments), "export.quality.order=gates", *arguments.overrides]
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.root or Path(temporary)
        first = workspace(base, arguments.targets, root / "measured")
        latencies = first.run.folder("profile") / "latency_table.json"
        images, records, rows = Images(first.data), [], {}
        print("everything is measured; what follows may share the machine", flush=True)
        for index, (name, overrides) in enumerate(STEPS.items()):
            chosen = [*base, "gpu.timing=table", f"gpu.table={latencies}", *overrides]
            work, found = sliced(name, chosen, arguments.targets, root / str(index), images)
            records += found
            rows[name] = [cell(record) for record in found]
            print(f"{name:75} {rows[name]}", flush=True)
        largest = max(arguments.targets)
        ways = finetuning(work, largest, arguments.samples - CALIBRATION, arguments.seeds, images)
        whole = {
            "environment": first.environment(),
            "timed_as": first.timed_as,
            "held_out": HELD_OUT,
            "teacher_accuracy": images.accuracy(first, first.teacher()),
            "recipe": recipe() | {"samples": arguments.samples, "refit_samples": CALIBRATION},
            "records": records,
            "finetuning": ways,
        }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(whole, indent=1) + "\n")
    print(table(rows, [f"at {record['target_ratio']:g}" for record in found]))
    means = {way["step"]: [f"{np.mean(way['finetuned']):.2f} ± {np.std(way['finetuned'], ddof=1):.2f}"] for way in ways}
    print(table(means, [f"at {largest:g}"]))


if __name__ == "__main__":
    main()
