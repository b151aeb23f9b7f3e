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
from hawada.stages import front
from hawada.workspace import Workspace

HELD_OUT = 5120  # training images
TRAINED = ["train.epochs=10", "train.steps_per_epoch=10", "train.patience=0"]  # of gates, at batch 64: 6,400 images
ALONE = ["export.sensitivity=gates", "export.reconstruct=false"]  # gates decide everything
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
    "sigmoid gates, trained; readers refitted": [*TRAINED, "export.sensitivity=gates"],
    "sigmoid gates, trained; readers refitted, worths measured": TRAINED,
    "no gates trained; readers refitted, worths measured, order by reconstruction": ["importance=obs"],
}
LAST = list(STEPS)[-1]  # makes what is finetuned


@dataclass(frozen=True)
class Way:
    """Of finetuning.

    Attributes:
        augmented: images are shifted and mirrored.
        blocks: what residual blocks put out is distilled too.
        larger: answers are those of another, larger teacher.
        smallest: the network of the lowest target rather than that of the highest.
        between: a fraction of the teacher's time to which it is pruned first, and where three tenths of the images go.
    """

    augmented: bool = False
    blocks: bool = True
    larger: bool = False
    smallest: bool = False
    between: float | None = None


FINETUNING = {
    "answers distilled, images augmented": Way(augmented=True, blocks=False),
    "blocks distilled too": Way(augmented=True),
    "images as they are": Way(blocks=False),
    "blocks distilled, images as they are": Way(),
    "blocks distilled, images as they are, answers of a larger teacher": Way(larger=True),
    "blocks distilled, images as they are, pruned at once": Way(smallest=True),
    "blocks distilled, images as they are, pruned in two steps": Way(smallest=True, between=0.55),
}


def held_out(data: Path) -> list[Any]:
    """Batches of the training images that `data.samples` leaves out, without augmentation."""
    plain: Any = cifar10(str(data)).plain
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))
    return [plain.__getitems__(rows.tolist()) for rows in order[-HELD_OUT:].split(512)]


def accuracy(work: Workspace, model: nn.Module, batches: Sequence[Any]) -> float:
    """In percent."""
    return 100 * score(model, batches, work.adapter.logits).accuracy


def sliced(name: str, work: Workspace, network: Network, batches: Sequence[Any]) -> list[dict[str, Any]]:
    """Accuracy at every target before any finetuning."""
    points = (work.run.result("front") if work.run.check("front") else front.run(work.cfg, work.run))["points"]
    records: list[dict[str, Any]] = []
    for point in points:
        target, reached = point["target_ratio"], point["status"] != "infeasible"
        records.append({"step": name, "target_ratio": target, "reached": reached})
        if reached:
            model = work.saved_model("front", f"{target:g}/slim")
            exported = accuracy(work, model, batches)
            recalibrate_batchnorm(model, calibration(work, network))
            records[-1] |= {
                "predicted_ratio": point["measured"]["ratio"]["median"],
                "exported": exported,
                "recalibrated": accuracy(work, model, batches),
                "widths": point["widths"],
            }
    return records


def finetuning(
    name: str, work: Workspace, network: Network, seeds: int, batches: Sequence[Any], larger: nn.Module | None
) -> dict[str, Any]:
    """Accuracy after one way of finetuning an exported model."""
    way = FINETUNING[name]
    target = min(network.targets) if way.smallest else max(network.targets)
    teacher, data = work.teacher(), work.data if way.augmented else unaugmented(work.data)
    recipe = network.recipe if way.blocks else replace(network.recipe, hidden_weight=0.0)
    other = OtherTeacher(larger.to(work.accelerator.device)) if way.larger and larger is not None else None
    samples = network.samples - network.calibration * (1 if way.between is None else 2)  # refits change weights too
    found, predicted = [], []
    for seed in range(seeds):
        finetune = partial(finetuned, work, teacher=teacher, data=data, seed=seed, recipe=recipe, other=other)
        if way.between is None:
            model = work.saved_model("front", f"{target:g}/slim")
            recalibrate_batchnorm(model, calibration(work, network))
            model = finetune(model, samples=samples)
        else:
            first = 3 * samples // 10
            model, ratio = in_steps(
                work,
                (way.between, target),
                (first, samples - first),
                partial(calibration, work, network),
                lambda model, count: finetune(model, samples=count),  # noqa: B023
            )
            predicted.append(ratio)
        found.append(accuracy(work, model, batches))
    record = {"step": name, "target_ratio": target, **asdict(way), "finetuned": found}
    return record | ({"predicted_ratio": predicted} if predicted else {})


def resnet56(weights: Path, data: Path, root: Path) -> nn.Module:
    """A larger teacher, made ready for these images."""
    model = CifarResNet(56)
    model.load_state_dict(load_file(adapted(weights, 56, data, 2, root)))
    return model.eval().requires_grad_(False)


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
        base = [*options(arguments, network, root), "importance=gates", f"data.samples={50_000 - HELD_OUT}"]
        base += arguments.overrides
        first = workspace(base, network.targets, root / "measured")
        latencies = first.run.folder("profile") / "latency_table.json"
        print("everything is measured; what follows may share the machine", flush=True)
        whole: dict[str, Any] = {
            "environment": first.environment(),
            "timed_as": first.timed_as,
            "held_out": HELD_OUT,
            "teacher_accuracy": accuracy(first, first.teacher(), batches),
            "recipe": network.recipe.as_dict(),
            "samples": network.samples,
            "records": [],
            "finetuning": [],
        }

        def keep(key: str, records: list[dict[str, Any]]) -> None:
            whole[key] += records
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(whole, indent=1) + "\n")

        for name in [each for each in STEPS if each in asked(list(STEPS)) or each == LAST]:
            told = [*base, "gpu.timing=table", f"gpu.table={latencies}", *STEPS[name]]
            work = workspace(told, network.targets, root / re.sub(r"\W+", "_", name))
            keep("records", sliced(name, work, network, batches))
        larger = None if arguments.larger is None else resnet56(arguments.larger, arguments.data, root)
        if larger is not None:
            whole["larger_teacher_accuracy"] = accuracy(work, larger, batches)
        for name in asked([each for each, way in FINETUNING.items() if larger is not None or not way.larger]):
            keep("finetuning", [finetuning(name, work, network, arguments.seeds, batches, larger)])
    rows = {r["step"]: [cell(o) for o in whole["records"] if o["step"] == r["step"]] for r in whole["records"]}
    print(table(rows, [f"at {target:g}" for target in network.targets]))
    ways = {
        way["step"]: [f"{way['target_ratio']:g}", mean_and_deviation(way["finetuned"])] for way in whole["finetuning"]
    }
    print(table(ways, ["at", "finetuned"]))


if __name__ == "__main__":
    main()
