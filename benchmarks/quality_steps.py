"""What each step gains: of gates, of the export, and of finetuning, one change at a time.

    python benchmarks/quality_steps.py --data cifar10_jpeg75 --weights resnet20_jpeg75.safetensors \\
        --output benchmarks/results/quality_steps_resnet20_cpu.json

The machine is measured once; after that widths are chosen by that table, so that all steps are compared at the same
predicted latency. They are evaluated on 5,120 training images that nothing else has used, except the teacher; test
images are not used. Prints the tables of docs/quality.md. Needs the extra `bench` for what it shares with
equal_latency.py.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar_resnet import CifarResNet
from equal_latency import calibration, finetuned, workspace
from networks import Network, chosen, network_parser, options, unaugmented
from safetensors.torch import load_file
from teacher import adapted
from torch import nn
from tried_steps import in_steps

from hawada.core.distill import OtherTeacher
from hawada.core.evaluate import score
from hawada.core.finetune import recalibrate_batchnorm
from hawada.data import cifar10
from hawada.experiment.results import to_json
from hawada.stages import front
from hawada.workspace import ModelStopwatch

HELD_OUT_IMAGES = 5120  # training images
GATES_TRAINED = ["train.epochs=10", "train.steps_per_epoch=10", "train.patience=0"]  # 6,400 images at batch 64
GATES_ALONE = ["export.sensitivity=gates", "export.reconstruct=false"]  # gates decide everything
FISHER_START = "train.importance.samples=2048"
STEPS: dict[str, list[str]] = {
    "sigmoid gates, trained": [*GATES_TRAINED, *GATES_ALONE],
    "not trained, begun by Fisher information": [FISHER_START, *GATES_ALONE],
    "begun by Fisher information": [*GATES_TRAINED, *GATES_ALONE, FISHER_START],
    "temperature annealed": [*GATES_TRAINED, *GATES_ALONE, "gate=annealed"],
    "both": [*GATES_TRAINED, *GATES_ALONE, "gate=annealed", FISHER_START],
    "straight-through, begun by Fisher information": [
        *GATES_TRAINED,
        *GATES_ALONE,
        "gate._target_=tried_gates.StraightThroughGate",
        FISHER_START,
    ],
    "hard-concrete": [*GATES_TRAINED, *GATES_ALONE, "gate=hard_concrete"],
    "polarization penalty": [*GATES_TRAINED, *GATES_ALONE, "penalties.polarization=1"],
    "sigmoid gates, trained; layers reconstructed": [*GATES_TRAINED, "export.sensitivity=gates"],
    "sigmoid gates, trained; layers reconstructed, sensitivity measured": GATES_TRAINED,
    "no gates trained; layers reconstructed, sensitivity measured, importance by reconstruction": ["importance=obs"],
}
LAST_STEP = list(STEPS)[-1]  # whose model is finetuned


@dataclass(frozen=True)
class Way:
    """A way of finetuning.

    Attributes:
        augmented: whether images are shifted and mirrored.
        blocks: whether the outputs of residual blocks are distilled too.
        larger: whether logits are those of another, larger teacher.
        smallest: whether the network of the lowest target is finetuned instead of that of the highest.
        between: a fraction of the teacher's time to which the network is pruned first, and at which three tenths of the
            images are used.
    """

    augmented: bool = False
    blocks: bool = True
    larger: bool = False
    smallest: bool = False
    between: float | None = None


FINETUNING = {
    "logits distilled, images augmented": Way(augmented=True, blocks=False),
    "blocks distilled too": Way(augmented=True),
    "images as they are": Way(blocks=False),
    "blocks distilled, images as they are": Way(),
    "blocks distilled, images as they are, logits of a larger teacher": Way(larger=True),
    "blocks distilled, images as they are, pruned at once": Way(smallest=True),
    "blocks distilled, images as they are, pruned in two steps": Way(smallest=True, between=0.55),
}


def held_out(data: Path) -> list[Any]:
    """Load the training images that `data.samples` leaves out, without augmentation."""
    plain: Any = cifar10(str(data)).plain
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))
    return [plain.__getitems__(rows.tolist()) for rows in order[-HELD_OUT_IMAGES:].split(512)]


def accuracy(watch: ModelStopwatch, model: nn.Module, batches: Sequence[Any]) -> float:
    """Compute the accuracy in percent."""
    return 100 * score(model, batches, watch.subject.adapter.logits).accuracy


def sliced(name: str, watch: ModelStopwatch, network: Network, batches: Sequence[Any]) -> list[dict[str, Any]]:
    """Make a record for every target: the accuracy before any finetuning."""
    run = watch.store.run
    points = (run.result("front") if run.check("front") else front.run(watch.cfg, run)).points
    records: list[dict[str, Any]] = []
    for point in points:
        target, reached = point.target_ratio, point.status != "infeasible"
        records.append({"step": name, "target_ratio": target, "reached": reached})
        if reached:
            model = watch.subject.saved_model("front", f"{target:g}/slim")
            exported = accuracy(watch, model, batches)
            recalibrate_batchnorm(model, calibration(watch, network))
            records[-1] |= {
                "predicted_ratio": point.measured.ratio.median,
                "exported": exported,
                "recalibrated": accuracy(watch, model, batches),
                "widths": point.widths,
            }
    return records


def finetuning(
    name: str, watch: ModelStopwatch, network: Network, seeds: int, batches: Sequence[Any], larger: nn.Module | None
) -> dict[str, Any]:
    """Make a record of one way of finetuning an exported model: the accuracy with each seed."""
    way = FINETUNING[name]
    target = min(network.targets) if way.smallest else max(network.targets)
    teacher, data = watch.subject.teacher(), watch.subject.data if way.augmented else unaugmented(watch.subject.data)
    recipe = network.recipe if way.blocks else replace(network.recipe, hidden_weight=0.0)
    other = OtherTeacher(larger.to(watch.subject.accelerator.device)) if way.larger and larger is not None else None
    samples = network.samples - network.calibration * (
        1 if way.between is None else 2
    )  # reconstruction changes weights too
    found, predicted = [], []
    for seed in range(seeds):
        finetune = partial(finetuned, watch, teacher=teacher, data=data, seed=seed, recipe=recipe, other=other)
        if way.between is None:
            model = watch.subject.saved_model("front", f"{target:g}/slim")
            recalibrate_batchnorm(model, calibration(watch, network))
            model = finetune(model, samples=samples)
        else:
            first = 3 * samples // 10
            model, ratio = in_steps(
                watch,
                (way.between, target),
                (first, samples - first),
                partial(calibration, watch, network),
                lambda model, count: finetune(model, samples=count),  # noqa: B023
            )
            predicted.append(ratio)
        found.append(accuracy(watch, model, batches))
    record = {"step": name, "target_ratio": target, **asdict(way), "finetuned": found}
    return record | ({"predicted_ratio": predicted} if predicted else {})


def resnet56(weights: Path, data: Path, root: Path) -> nn.Module:
    """Load a larger teacher that is adapted to these images."""
    model = CifarResNet(56)
    model.load_state_dict(load_file(adapted(weights, 56, data, 2, root)))
    return model.eval().requires_grad_(False)


def table(rows: Mapping[str, Sequence[str]], head: Sequence[str]) -> str:
    """Write a table in Markdown."""
    lines = [["", *head], ["---"] * (len(head) + 1), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(record: Mapping[str, Any]) -> str:
    """Write the accuracy as exported, and with BatchNorm recalibrated."""
    return f"{record['exported']:.1f} / {record['recalibrated']:.1f}" if record["reached"] else "not reached"


def mean_and_deviation(values: Sequence[float]) -> str:
    """Write the mean over seeds, and with more than one seed the deviation."""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def main() -> None:
    """Evaluate every step, write the figures and print the tables."""
    parser = network_parser(str(__doc__))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of finetuning")
    parser.add_argument("--root", type=Path, help="folder that keeps the runs; a temporary one if left out")
    parser.add_argument("--only", nargs="+", help="rows, by a part of their names; the last step is always run")
    parser.add_argument("--larger", type=Path, help="weights of ResNet-56, finetuned for two epochs to teach too")
    arguments = parser.parse_args()
    if arguments.network != "cifar_resnet":
        parser.error("images are held out of CIFAR-10 alone")
    network, batches = chosen(arguments), held_out(arguments.data)

    def asked(names: Sequence[str]) -> list[str]:
        return [name for name in names if not arguments.only or any(part in name for part in arguments.only)]

    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.root or Path(temporary)
        base = [*options(arguments, network, root), "importance=gates", f"data.samples={50_000 - HELD_OUT_IMAGES}"]
        base += arguments.overrides
        first = workspace(base, network.targets, root / "measured")
        latencies = first.store.folder("profile") / "latency_table.json"
        print("everything is measured; what follows may share the machine", flush=True)
        whole: dict[str, Any] = {
            "environment": to_json(first.store.environment),
            "timed_as": first.timed_as,
            "held_out": HELD_OUT_IMAGES,
            "teacher_accuracy": accuracy(first, first.subject.teacher(), batches),
            "recipe": network.recipe.as_dict(),
            "samples": network.samples,
            "records": [],
            "finetuning": [],
        }

        def keep(key: str, records: list[dict[str, Any]]) -> None:
            whole[key] += records
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(whole, indent=1) + "\n")

        for name in [each for each in STEPS if each in asked(list(STEPS)) or each == LAST_STEP]:
            overrides = [*base, "gpu.timing=table", f"gpu.table={latencies}", *STEPS[name]]
            watch = workspace(overrides, network.targets, root / re.sub(r"\W+", "_", name))
            keep("records", sliced(name, watch, network, batches))
        larger = None if arguments.larger is None else resnet56(arguments.larger, arguments.data, root)
        if larger is not None:
            whole["larger_teacher_accuracy"] = accuracy(watch, larger, batches)
        for name in asked([each for each, way in FINETUNING.items() if larger is not None or not way.larger]):
            keep("finetuning", [finetuning(name, watch, network, arguments.seeds, batches, larger)])
    rows = {r["step"]: [cell(o) for o in whole["records"] if o["step"] == r["step"]] for r in whole["records"]}
    print(table(rows, [f"at {target:g}" for target in network.targets]))
    ways = {
        way["step"]: [f"{way['target_ratio']:g}", mean_and_deviation(way["finetuned"])] for way in whole["finetuning"]
    }
    print(table(ways, ["at", "finetuned"]))


if __name__ == "__main__":
    main()
