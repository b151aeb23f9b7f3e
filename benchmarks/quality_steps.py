"""What each step of the export is worth: accuracy of sliced models before any finetuning, one change at a time.

    python benchmarks/quality_steps.py --data cifar10_jpeg75 --weights resnet20_jpeg75.safetensors \\
        --output benchmarks/results/quality_steps_resnet20_cpu.json

The machine is measured once; after that widths are chosen by that table, so that all steps are compared at the same
predicted latency. BatchNorm is recalibrated for all of them. They are judged on 5,000 training images that nothing else
has seen, except the teacher. Needs the extra `bench` for what it shares with equal_latency.py.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baselines import CALIBRATION
from equal_latency import network_parser, options, workspace
from torch import nn

from hawada.core.evaluate import score
from hawada.core.finetune import recalibrate_batchnorm
from hawada.stages import front
from hawada.stages.workspace import Workspace

HELD_OUT = 5120  # training images
TRAINED = ["train.epochs=1", "train.steps_per_epoch=100"]  # of gates, at batch 64: 6,400 images
STEPS: dict[str, list[str]] = {
    "trained gates": [*TRAINED, "export.quality.worth=gates", "export.quality.compensate=false"],
    "hard-concrete gates instead": [
        *TRAINED,
        "gate=hard_concrete",
        "export.quality.worth=gates",
        "export.quality.compensate=false",
    ],
    "trained gates + least squares": [*TRAINED, "export.quality.worth=gates"],
    "+ measured worth": TRAINED,
    "measured worth, no gates trained": [],
    "+ order by reconstruction": ["export.quality.order=reconstruction"],
}


def held_out_accuracy(work: Workspace, model: nn.Module) -> float:
    """On training images behind those that calibration takes, in percent."""
    shown = HELD_OUT + CALIBRATION
    batches = list(work.data.calibration_loader(512, shown))[CALIBRATION // 512 :]
    return 100 * score(model, batches, work.adapter.logits).accuracy


def step(name: str, overrides: Sequence[str], targets: Sequence[float], root: Path) -> list[dict[str, Any]]:
    """Accuracy at every target with some of the settings."""
    work = workspace(overrides, targets, root)
    records = []
    for point in front.run(work.cfg, work.run)["points"]:
        if point["status"] == "infeasible":
            records.append({"step": name, "target_ratio": point["target_ratio"], "reached": False})
            continue
        model = work.saved_model("front", f"{point['target_ratio']:g}/slim")
        exported = held_out_accuracy(work, model)
        recalibrate_batchnorm(model, work.data.calibration_loader(128, CALIBRATION))
        after, ratio = held_out_accuracy(work, model), point["measured"]["ratio"]["median"]
        records.append({"step": name, "target_ratio": point["target_ratio"], "predicted_ratio": ratio})
        records[-1] |= {"reached": True, "exported": exported, "recalibrated": after, "widths": point["widths"]}
        print(
            f"{name:45} target {point['target_ratio']:.2f}: {exported:5.2f} %, recalibrated {after:5.2f} %", flush=True
        )
    return records


def main() -> None:
    """Judge every step and write the figures."""
    arguments = network_parser(str(__doc__)).parse_args()
    base = [*options(arguments), "export.quality.order=gates", *arguments.overrides]
    with tempfile.TemporaryDirectory() as root:
        first = workspace(base, arguments.targets, Path(root) / "measured")
        table = first.run.folder("profile") / "latency_table.json"
        records = []
        for index, (name, overrides) in enumerate(STEPS.items()):
            chosen = [*base, "gpu.timing=table", f"gpu.table={table}", *overrides]
            records += step(name, chosen, arguments.targets, Path(root) / str(index))
        whole = {"environment": first.environment(), "timed_as": first.timed_as, "records": records}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
