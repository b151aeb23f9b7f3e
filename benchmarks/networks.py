"""The networks that benchmarks slim: how HawAda is configured for them, and how they are finetuned."""

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
    """The recipe of finetuning, the same for all methods; it was chosen on HawAda's models.

    Attributes:
        batch: the number of images in a step.
        hidden_weight: the weight of the difference between the outputs of the slim model's and the teacher's residual
            blocks.
        lr: the peak learning rate of AdamW.
        weight_decay: the weight decay of AdamW.
        label_weight: the factor of the cross-entropy with the labels.
        warm_up: the fraction of the steps in which the learning rate rises.
        recalibrated: whether BatchNorm statistics are computed anew at the end, for norms that follow training slowly.
    """

    batch: int = 64
    hidden_weight: float = 60.0
    lr: float = 4e-3
    weight_decay: float = 5e-4
    label_weight: float = 0.1
    warm_up: float = 0.1
    recalibrated: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe for the record."""
        return asdict(self) | {"temperature": DISTILLATION.temperature}


@dataclass(frozen=True)
class Network:
    """One network with its images.

    Attributes:
        targets: the fractions of the teacher's time.
        batch: the batch size whose latency is compared.
        samples: the number of training images that change weights, those of HawAda's reconstruction included.
        calibration: the number of training images that importance, sensitivity, reconstruction and BatchNorm
            statistics use.
        multiple: the number of which the widths of every method are multiples.
        recipe: the recipe of finetuning.
        inner: whether Torch-Pruning prunes only channels inside residual blocks, because its graph does not follow
            padded shortcuts.
        weights: a function that prepares the teacher's weights for the images in a folder, and returns their file.
        options: a function that returns HawAda's configuration of the network, without weights.
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
    """Make the parser of the arguments that all benchmarks on these networks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default="cifar_resnet")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz and test.npz (or val.npz)")
    parser.add_argument("--weights", type=Path, required=True, help="file of the teacher's weights")
    parser.add_argument("--depth", type=int, default=20, help="depth of a CIFAR ResNet")
    parser.add_argument(
        "--teacher-epochs",
        type=int,
        default=0,
        help="epochs of training images on which a CIFAR ResNet is finetuned first",
    )
    parser.add_argument("--batch", type=int, help="batch size whose latency is compared")
    parser.add_argument("--multiple", type=int, help="number of which all widths are multiples")
    parser.add_argument("--targets", type=float, nargs="+", help="fractions of the teacher's time")
    parser.add_argument("--samples", type=int, help="training images that change weights, with HawAda's reconstruction")
    parser.add_argument("--recipe-batch", type=int, help="images of a step of finetuning")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write; a plot lies beside it")
    parser.add_argument("overrides", nargs="*", help="further hawada overrides, after --")
    return parser


def chosen(arguments: argparse.Namespace) -> Network:
    """Return the network as the command line asks for it."""
    network = NETWORKS[arguments.network]
    given = {name: getattr(arguments, name) for name in ("batch", "multiple", "samples")}
    given["targets"] = None if arguments.targets is None else tuple(sorted(set(arguments.targets), reverse=True))
    if arguments.recipe_batch is not None:
        given["recipe"] = replace(network.recipe, batch=arguments.recipe_batch)
    return replace(network, **{name: value for name, value in given.items() if value is not None})


def options(arguments: argparse.Namespace, network: Network, root: Path) -> list[str]:
    """Return HawAda's configuration, in which no gates are trained and sensitivity is measured."""
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
    """Return the same data, with training images that are not augmented."""
    return VisionData(data.plain, data.plain, data.test, classes=data.classes, repeats=True)
