"""Which networks can be pruned, how far, and is the result exact? Torch-Pruning beside it.

    pip install timm torch-pruning && python benchmarks/breadth.py --output benchmarks/results/breadth_cpu.json

For the smallest model of each family of timm, and every classification model of torchvision with `--torchvision`
(num_classes=10, random weights, norms randomised), each in a process of its own with a time limit: whether a gated and
a cut model compute the same for random widths (the largest difference relative to the largest output), the share of
the parameters that is left with every branch kept and every width at floor(width / 2), the seconds that declaring
takes, and the weights with an output axis that is neither in a group nor listed. Networks that the output holds already
are left out, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hawada.adapters import Shape
from hawada.adapters.graph import Declaration, GraphAdapter, Trace
from hawada.core.evaluate import count_parameters
from hawada.core.gates import Student
from hawada.core.structure import Group, keep_first, materialize

CLASSES, KEEPS, LIMIT_S = 10, 3, 300.0
EXACT = 1e-5  # largest difference, relative to the largest output
GOAL = 0.35  # share of the parameters that is left
LARGEST_SIDE = 128  # of the images, where a network takes any; compared, nothing is timed


class Network(GraphAdapter):
    """A network of timm (`timm:resnet18`) or torchvision (`torchvision:resnet18`)."""

    def __init__(self, name: str) -> None:
        library, _, arch = name.partition(":")
        if library == "torchvision":
            super().__init__(arch, num_classes=CLASSES, image_size=side_of(arch), stream=True)
        else:
            import timm  # an optional package, which other networks do without

            self.model = timm.create_model(arch, num_classes=CLASSES).eval()
            channels, side = self.model.default_cfg["input_size"][:2]
            fixed = self.model.default_cfg.get("fixed_input_size")
            size = side if fixed else min(side, LARGEST_SIDE)
            super().__init__(factory=arch, image_size=size, channels=channels, stream=True)

    def _build_model(self) -> nn.Module:
        return self.model if hasattr(self, "model") else super()._build_model()

    def declared(self, model: nn.Module) -> tuple[Trace, Declaration]:
        """What the groups are made from."""
        return self._declaration_of(model)


def side_of(arch: str) -> int:
    """The side of the images of a network of torchvision."""
    return 224 if arch.startswith(("vit_", "maxvit")) else LARGEST_SIDE


def randomised(model: nn.Module) -> nn.Module:
    """Draw what would hide a wrong gate at its initial value: norms, and parameters that begin with zeros."""
    torch.manual_seed(0)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_var":
                buffer.uniform_(0.5, 2.0)
            elif name == "running_mean":
                buffer.normal_(std=0.3)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() <= 1 or float(parameter.detach().std()) < 1e-4:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def draw(groups: list[Group], seed: int) -> dict[str, tuple[int, ...]]:
    """Random kept units; a branch stays with a probability of 0.7."""
    chosen = random.Random(seed)
    keep = {}
    for group in groups:
        if group.removes:
            keep[group.name] = tuple(range(chosen.random() < 0.7))
        else:
            keep[group.name] = tuple(sorted(chosen.sample(range(group.units), chosen.randint(1, group.units))))
    return keep


def unlisted(declared: Declaration) -> list[str]:
    """Weights whose output axis is neither cut by a group nor kept for a reason that is told."""
    cut = {(cut.tensor, cut.dim) for group in declared.groups for cut in group.cuts}
    channels = declared.channels
    told = {int(label) for _, labels, _ in declared.walk.obstacles for label in channels[labels]}
    told |= {int(channels[0])}
    produced = [place for place in declared.walk.places if place.role == "produces"]
    return [
        place.tensor
        for place in produced
        if (place.tensor, place.dim) not in cut and not told.issuperset(int(c) for c in channels[place.labels])
    ]


def examine(name: str) -> dict[str, Any]:
    """Prune one network."""
    torch.set_num_threads(1)
    adapter = Network(name)
    model = randomised(adapter.skeleton())
    inputs = adapter.example_inputs(Shape(2))
    start = time.perf_counter()
    try:
        _, declared = adapter.declared(model)
    except ValueError as error:
        return {"status": "refused", "reason": str(error)}
    seconds = time.perf_counter() - start
    groups, worst = declared.groups, 0.0
    half = {group.name: 1 if group.removes else max(1, group.full_width // 2) for group in groups}
    left = count_parameters(materialize(model, groups, keep_first(groups, half))) / count_parameters(model)
    with torch.no_grad(), Student(model, groups) as student:
        for seed in range(KEEPS):
            keep = draw(groups, seed)
            cut: Tensor = materialize(model, groups, keep).eval()(*inputs)
            with student.hard_gated(keep):
                gated: Tensor = student(*inputs)
            worst = max(worst, float((gated - cut).abs().max() / gated.abs().max().clamp_min(1e-9)))
    kinds: dict[str, int] = {}
    for group in groups:
        kinds[group.kind] = kinds.get(group.kind, 0) + 1
    return {
        "status": "exact" if worst <= EXACT else "wrong",
        "difference": worst,
        "left": round(left, 4),
        "seconds": round(seconds, 2),
        "groups": kinds,
        "unlisted": unlisted(declared),
    }


def torch_pruning(name: str) -> dict[str, Any]:
    """The share of the parameters that Torch-Pruning leaves at a pruning ratio of one half."""
    import torch_pruning as tp  # the baseline, an optional package

    torch.set_num_threads(1)
    adapter = Network(name)
    model, inputs = randomised(adapter.skeleton()), adapter.example_inputs(Shape(2))
    before = count_parameters(model)
    last = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    importance = tp.importance.MagnitudeImportance()
    tp.pruner.MagnitudePruner(model, inputs[0], importance=importance, pruning_ratio=0.5, ignored_layers=[last]).step()
    with torch.no_grad():
        model(*inputs)
    return {"status": "runs", "left": round(count_parameters(model) / before, 4)}


def in_a_process(name: str, method: str) -> dict[str, Any]:
    """Run one examination in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", name, "--method", method]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"status": "crash", "reason": f"took longer than {LIMIT_S:.0f} s"}
    if done.returncode:
        return {"status": "crash", "reason": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def smallest_of_timm() -> list[str]:
    """The smallest model of each family of timm."""
    import timm  # an optional package

    smallest: dict[str, tuple[int, str]] = {}
    for family in timm.list_modules():
        for name in timm.list_models(module=family):
            try:
                with torch.device("meta"):
                    size = count_parameters(timm.create_model(name))
            except Exception:  # some models compute with values when they are built
                continue
            smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    return [f"timm:{smallest[family][1]}" for family in sorted(smallest)]


def of_torchvision() -> list[str]:
    """The classification models of torchvision."""
    import torchvision

    return [f"torchvision:{name}" for name in torchvision.models.list_models(torchvision.models)]


def line(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """One network in words."""
    left = f"{ours['left']:.2f} left, {ours['difference']:.0e}" if "left" in ours else ours["reason"][:90]
    other = f"{theirs['left']:.2f}" if "left" in theirs else theirs["status"]
    return f"{name:42} {ours['status']:8} {left}; Torch-Pruning {other}"


def main() -> None:
    """Examine every network that the output does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="examine one network in this process")
    parser.add_argument("--method", choices=("hawada", "torch_pruning"), default="hawada")
    parser.add_argument("--torchvision", action="store_true", help="torchvision's models too")
    parser.add_argument("--output", type=Path, default=Path("breadth.json"))
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps({"hawada": examine, "torch_pruning": torch_pruning}[arguments.method](arguments.one)))
        return
    import timm  # an optional package

    known = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"networks": {}}
    known["environment"] = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    for name in smallest_of_timm() + (of_torchvision() if arguments.torchvision else []):
        if name not in known["networks"]:
            ours, theirs = in_a_process(name, "hawada"), in_a_process(name, "torch_pruning")
            known["networks"][name] = {"hawada": ours, "torch_pruning": theirs}
            arguments.output.write_text(json.dumps(known, indent=1) + "\n")
            print(line(name, ours, theirs), flush=True)
    found = [network["hawada"] for network in known["networks"].values()]
    exact = [network for network in found if network["status"] == "exact"]
    far = [network for network in exact if network["left"] <= GOAL]
    print(f"{len(found)} networks: {len(exact)} exact, {len(far)} of them with at most {GOAL} of the parameters left")


if __name__ == "__main__":
    main()
