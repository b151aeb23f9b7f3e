"""A segmentation model and a detector, trained here on drawings, go through the whole pipeline to 0.7 of their time.

    pip install -e '.[detection]' && python benchmarks/dense_tasks.py --output benchmarks/results/dense_tasks_cpu.json

Coloured discs, squares and triangles are drawn on noise, with their masks and boxes. torchvision's
lraspp_mobilenet_v3_large and fasterrcnn_mobilenet_v3_large_320_fpn are trained from random weights for some minutes
each on images of 160 pixels, and `hawada model=segmentation` and `hawada model=detection` slim them. Teacher and slim
model are then scored by torchmetrics on drawings that neither has seen. What the folder `--work` holds already is not
made again.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor, nn

import hawada
from hawada.data import coco, masks

SIDE, CLASSES = 160, 4  # pixels of a drawing; the background, discs, squares and triangles
TRAINED, TESTED = 600, 200  # drawings
BATCH, LEARNING_RATE = 16, 2e-3
TARGET = 0.7
NETWORKS = {"segmentation": "lraspp_mobilenet_v3_large", "detection": "fasterrcnn_mobilenet_v3_large_320_fpn"}
ARGUMENTS = {"segmentation": {}, "detection": {"min_size": SIDE, "max_size": SIDE}}


def draw(seed: int) -> tuple[Image.Image, Image.Image, list[tuple[list[float], int]]]:
    """One drawing: the image, its mask, and its boxes (left, top, width, height) with their classes."""
    random = np.random.default_rng(seed)
    noise = random.normal(random.uniform(60, 200, 3), 25, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
    image, mask = Image.fromarray(noise), Image.new("L", (SIDE, SIDE))
    pens, taken, boxes = (ImageDraw.Draw(image), ImageDraw.Draw(mask)), np.zeros((SIDE, SIDE), bool), []
    for _ in range(int(random.integers(1, 4))):
        kind, size = int(random.integers(1, CLASSES)), int(random.integers(28, 64))
        left, top = (int(place) for place in random.integers(0, SIDE - size, 2))
        if taken[top : top + size, left : left + size].any():
            continue
        taken[top : top + size, left : left + size] = True
        colour = tuple(int(part) for part in random.integers(0, 256, 3))
        corners = [left, top, left + size, top + size]
        for pen, fill in zip(pens, (colour, kind), strict=True):
            if kind == 1:
                pen.ellipse(corners, fill)
            elif kind == 2:
                pen.rectangle(corners, fill)
            else:
                pen.polygon([(left, top + size), (left + size, top + size), (left + size // 2, top)], fill)
        boxes.append(([float(left), float(top), float(size), float(size)], kind))
    return image, mask, boxes


def write_drawings(folder: Path) -> None:
    """Write images, masks and a COCO annotation file, in `train` and `val`."""
    if (folder / "val" / "_annotations.coco.json").is_file():
        return
    for part, first, count in (("train", 0, TRAINED), ("val", 10**6, TESTED)):
        for name in ("images", "masks"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for index in range(count):
            image, mask, boxes = draw(first + index)
            image.save(folder / part / "images" / f"{index}.png")
            mask.save(folder / part / "masks" / f"{index}.png")
            images.append({"id": index, "file_name": f"{index}.png"})
            annotations += [{"image_id": index, "bbox": box, "category_id": kind} for box, kind in boxes]
        categories = [{"id": kind} for kind in range(1, CLASSES)]
        record = {"images": images, "annotations": annotations, "categories": categories}
        (folder / part / "_annotations.coco.json").write_text(json.dumps(record))


def build(task: str) -> nn.Module:
    """The network without weights."""
    none: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    model: nn.Module = torchvision.models.get_model(NETWORKS[task], **none, **ARGUMENTS[task])
    return model


def batches(data: Any, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches without end."""
    while True:
        for images, labels, *_ in data.train_loader(BATCH, seed):
            yield images, labels
        seed += 1


def loss_of(task: str, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss that torchvision trains such a network with."""
    if task == "segmentation":
        logits = model(images)["out"].flatten(2)  # (batch, classes, pixels)
        return F.cross_entropy(logits, labels)
    real = [rows[rows[:, 4] >= 0] for rows in labels]
    targets = [{"boxes": rows[:, :4], "labels": rows[:, 4].long()} for rows in real]
    losses: dict[str, Tensor] = model(list(images), targets)
    return torch.stack(list(losses.values())).sum()


def train(task: str, data: Any, path: Path, minutes: float) -> None:
    """Train a teacher and save its state dict."""
    if path.is_file():
        return
    torch.manual_seed(0)
    model = build(task).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # the statistics of few steps count
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    start = time.monotonic()
    for step, (images, labels) in enumerate(batches(data, 0)):
        spent = (time.monotonic() - start) / 60 / minutes
        if spent >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * (1 - spent)
        optimizer.zero_grad()
        loss = loss_of(task, model, images, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"{task}: step {step}, loss {float(loss):.3f}", flush=True)
    torch.save({"state_dict": model.state_dict()}, path)


@torch.no_grad()
def score(task: str, model: nn.Module, data: Any) -> float:
    """The mean intersection over union, or the mean average precision at one half, by torchmetrics."""
    model.eval()
    if task == "segmentation":
        from torchmetrics.segmentation import MeanIoU

        union = MeanIoU(num_classes=CLASSES, input_format="index")
        for images, labels in data.test_loader(BATCH):
            union.update(model(images)["out"].argmax(1).flatten(1), labels)
        return float(union.compute())
    from torchmetrics.detection import MeanAveragePrecision

    precision = MeanAveragePrecision(iou_thresholds=[0.5])
    for images, labels in data.test_loader(BATCH):
        real = [rows[rows[:, 4] >= 0] for rows in labels]
        precision.update(model(images), [{"boxes": rows[:, :4], "labels": rows[:, 4].long()} for rows in real])
    return float(precision.compute()["map_50"])


def slim(task: str, work: Path, path: Path) -> dict[str, Any]:
    """Run the pipeline as a user does, and return its result."""
    command = [
        *(sys.executable, "-m", "hawada", f"model={task}", f"name={task}", f"output_dir={work / 'outputs'}"),
        *(f"model.path={path}", f"model.adapter.num_classes={CLASSES}", f"model.adapter.image_size={SIDE}"),
        *(
            "model.adapter.weights=null",
            f"model.adapter.arch={NETWORKS[task]}",
            f"data.root={work / 'drawings'}",
            f"budget.target_ratio={TARGET}",
        ),
        *("data.workers=0", "calibration.samples=64", "budget.batch=4"),
        *(["model.adapter.arguments={min_size: 160, max_size: 160}"] if task == "detection" else []),
    ]
    subprocess.run(command, check=False)
    result: dict[str, Any] = json.loads((work / "outputs" / task / "result.json").read_text())
    return result


def main() -> None:
    """Run both tasks and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/dense_tasks"))
    parser.add_argument("--output", type=Path, default=Path("dense_tasks.json"))
    parser.add_argument("--minutes", type=float, default=8.0, help="of training each teacher")
    parser.add_argument("--tasks", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    arguments = parser.parse_args()
    work, found = arguments.work, {}
    write_drawings(work / "drawings")
    for task in arguments.tasks:
        load = {"segmentation": masks, "detection": coco}[task]
        data = load(str(work / "drawings"), image_size=SIDE, workers=0)
        path = work / f"{task}.pth"
        train(task, data, path, arguments.minutes)
        teacher = build(task)
        teacher.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        print(f"{task}: teacher {score(task, teacher, data):.4f}", flush=True)
        result = slim(task, work, path)
        small = hawada.load(result["slim"]["path"])
        found[task] = {
            "network": NETWORKS[task],
            "verdict": result["verdict"],
            "ratio": result["latency_ratio"],
            "params": result["slim"]["params"] / result["teacher"]["params"],
            "metric": result["metric"],
            "teacher": score(task, teacher, data),
            "slim": score(task, small, data),
        }
        print(json.dumps(found[task]), flush=True)
    environment = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    arguments.output.write_text(json.dumps({"environment": environment, "tasks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
