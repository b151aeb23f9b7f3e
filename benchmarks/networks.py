"""The networks that benchmarks slim: how HawAda is told of them, and how they are finetuned."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from teacher import adapted, ten_classes

from hawada.core.distill import KDConfig
from hawada.data import VisionData

DISTILLATION = KDConfig(temperature=4.0)


@dataclass(frozen=True)
class Recipe:
    """Of finetuning, the same for all methods; it was chosen on HawAda's models.

    Attributes:
        batch: images of a step.
        hidden_weight: of the difference between what residual blocks put out, the slim model's and the teacher's.
        lr: peak learning rate of AdamW.
        weight_decay: of the weights.
        label_weight: factor of the cross-entropy.
        warm_up: fraction of the steps that the learning rate rises.
        recalibrated: BatchNorm statistics are taken anew at the end, for norms that follow training slowly.
    """

    batch: int = 64
    hidden_weight: float = 60.0
    lr: float = 4e-3
    weight_decay: float = 5e-4
    label_weight: float = 0.1
    warm_up: float = 0.1
    recalibrated: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self) | {"temperature": DISTILLATION.temperature}


@dataclass(frozen=True)
class Network:
    """One network with its images.

    Attributes:
        targets: fractions of the teacher's time.
        batch: whose latency is compared.
        samples: training images that change weights, HawAda's refit included.
        calibration: training images that importance, worths, refits and BatchNorm statistics see.
        multiple: widths of every method are multiples of it.
        recipe: of finetuning.
        inner: whether Torch-Pruning prunes only channels inside residual blocks: its graph does not follow shortcuts
            that are padded.
        weights: makes the teacher's weights ready for the images, in a folder; returns their file.
        options: HawAda's configuration of the network, without weights.
    """

    targets: tuple[float, ...]
    batch: int
    samples: int
    calibration: int
    multiple: int
    recipe: Recipe
    inner: bool
    weights: Callable[[argparse.Namespace, Path], Path]
    options: Callable[[argparse.Namespace], list[str]]


def _cifar_weights(arguments: argparse.Namespace, root: Path) -> Path:
    if not arguments.teacher_epochs:
        return arguments.weights
    return adapted(arguments.weights, arguments.depth, arguments.data, arguments.teacher_epochs, root)


def _cifar_options(arguments: argparse.Namespace) -> list[str]:
    return [
        "model.adapter.factory=cifar_resnet.CifarResNet",
        f"model.adapter.arguments={{depth: {arguments.depth}}}",
        "model.adapter.image_size=32",
        "export.points=6",
        "profile.held_out_models=4",
    ]


def _lite_weights(arguments: argparse.Namespace, root: Path) -> Path:
    return ten_classes(arguments.weights, arguments.data, root)


def _lite_options(arguments: argparse.Namespace) -> list[str]:
    return [
        "data._target_=imagenette.imagenette",
        "model.adapter.factory=efficientnet_lite.EfficientNetLite0",
        "model.adapter.image_size=224",
        "export.points=3",
        "calibration.batch_size=32",
        "profile.points=4",
        "profile.held_out_models=4",
        "groups.kind=[channel,branch]",
    ]


NETWORKS = {
    "cifar_resnet": Network(
        targets=(0.65, 0.5, 0.35),
        batch=64,
        samples=30_000,
        calibration=2048,
        multiple=2,
        recipe=Recipe(),
        inner=True,
        weights=_cifar_weights,
        options=_cifar_options,
    ),
    "efficientnet_lite0": Network(
        targets=(0.6,),
        batch=16,
        samples=3000,
        calibration=192,
        multiple=8,
        recipe=Recipe(batch=32, hidden_weight=0.0, lr=1e-3, recalibrated=True),
        inner=False,
        weights=_lite_weights,
        options=_lite_options,
    ),
}


def network_parser(description: str) -> argparse.ArgumentParser:
    """What benchmarks on these networks are asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default="cifar_resnet")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz and test.npz (or val.npz)")
    parser.add_argument("--weights", type=Path, required=True, help="the teacher's")
    parser.add_argument("--depth", type=int, default=20, help="of a CIFAR ResNet")
    parser.add_argument(
        "--teacher-epochs", type=int, default=0, help="of training images on which a CIFAR ResNet is finetuned first"
    )
    parser.add_argument("--batch", type=int, help="whose latency is compared")
    parser.add_argument("--multiple", type=int, help="of which all widths are multiples")
    parser.add_argument("--targets", type=float, nargs="+", help="fractions of the teacher's time")
    parser.add_argument("--samples", type=int, help="training images that change weights; HawAda's refit included")
    parser.add_argument("--recipe-batch", type=int, help="images of a step of finetuning")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write; a plot lies beside it")
    parser.add_argument("overrides", nargs="*", help="further hawada overrides, after --")
    return parser


def chosen(arguments: argparse.Namespace) -> Network:
    """The network as the command asks for it."""
    network = NETWORKS[arguments.network]
    given = {name: getattr(arguments, name) for name in ("batch", "multiple", "samples")}
    given["targets"] = None if arguments.targets is None else tuple(sorted(set(arguments.targets), reverse=True))
    if arguments.recipe_batch is not None:
        given["recipe"] = replace(network.recipe, batch=arguments.recipe_batch)
    return replace(network, **{name: value for name, value in given.items() if value is not None})


def options(arguments: argparse.Namespace, network: Network, root: Path) -> list[str]:
    """HawAda's configuration: no gates are trained, what widths are worth is measured."""
    return [
        "model=convnet",
        "data=cifar10",
        f"data.root={arguments.data.resolve()}",
        "model.adapter.arch=null",
        "model.adapter.num_classes=10",
        "model.adapter.weights=null",
        f"budget.batch={network.batch}",
        f"gpu.multiple.channel=[{network.multiple}]",
        f"export.minimum.channel={network.multiple}",
        "importance=obs",
        f"calibration.samples={network.calibration}",
        "train.epochs=0",
        "train.batch_size=64",
        "compute.mixed_precision=bf16",  # finetuning of all methods
        *network.options(arguments),
        f"model.path={network.weights(arguments, root).resolve()}",
    ]


def unaugmented(data: VisionData) -> VisionData:
    """The same, and its training images as they are."""
    return VisionData(data.plain, data.plain, data.test, classes=data.classes, repeats=True)
