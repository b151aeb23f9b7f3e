"""Which networks can be pruned, how far, and is the result exact? Torch-Pruning beside it.

    pip install timm torch-pruning && python benchmarks/breadth.py --output benchmarks/results/breadth_cpu.json

For the smallest model of each family of timm, and with `--torchvision` every classification, segmentation, detection
and video model of torchvision (num_classes=10, random weights, norms randomised), each in a process of its own with a
time limit: whether a gated and a cut model compute the same for random widths (the largest difference relative to the
largest output), the share of the parameters that is left with every branch kept and every width at floor(width / 2),
the seconds that declaring takes, and the layers whose outputs are neither in a group nor listed. What the output holds
already is not done again, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from hawada.adapters import Shape
from hawada.adapters.graph import GraphAdapter
from hawada.adapters.huggingface import TimmAdapter
from hawada.adapters.torchvision import DetectorAdapter
from hawada.core.evaluate import compare_outputs, count_parameters
from hawada.core.gates import Student
from hawada.core.structure import Group, Inputs, keep_first, materialize

CLASSES, KEEPS, LIMIT_S = 10, 3, 300.0
EXACT, EXACT_IN_DOUBLE = 1e-5, 1e-10  # largest difference, relative to the largest output; in float64 if rounding
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
GOAL = 0.35  # share of the parameters that is left
OF_ONE_SIZE = ("halonet_h1", "deepseek_vit_412m")  # which do not say so
LARGEST_SIDE = 128  # of the images, where a network takes any; compared, nothing is timed


def adapter_of(name: str) -> GraphAdapter:
    """The adapter of a network of timm (`timm:resnet18`) or torchvision (`torchvision:resnet18`)."""
    library, _, arch = name.partition(":")
    if library == "timm":
        import timm  # an optional package, which other networks do without

        cfg = timm.get_pretrained_cfg(arch)
        side = cfg.input_size[1]
        size = side if cfg.fixed_input_size or arch in OF_ONE_SIZE else min(side, LARGEST_SIDE)
        return TimmAdapter(arch, num_classes=CLASSES, image_size=size, stream=True)
    if arch in torchvision.models.list_models(torchvision.models.detection):
        return DetectorAdapter(arch, num_classes=CLASSES, image_size=LARGEST_SIDE, stream=True)
    return GraphAdapter(arch, num_classes=CLASSES, image_size=size_of(arch), stream=True)


def size_of(arch: str) -> int | list[int]:
    """The size of the inputs of a network of torchvision."""
    if arch in torchvision.models.list_models(torchvision.models.video):
        return [16, 224, 224] if arch.startswith(("mvit", "swin3d")) else [16, 112, 112]
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


def unlisted(adapter: GraphAdapter, model: nn.Module) -> list[str]:
    """Convolutions and linear layers whose outputs are neither cut by a group nor listed with the reason."""
    cut = {
        cut.module
        for group in adapter.groups(model)
        for cut in group.cuts
        if cut.dim == int(getattr(model.get_submodule(cut.module), "transposed", False))
    }
    listed = {kept.module for kept in adapter.kept_whole(model)}
    layers = [path for path, module in model.named_modules() if isinstance(module, LAYERS)]
    inner = {path.rpartition(".parametrizations")[0] for path in cut | listed}  # of a weight that is computed
    several = [path for path in layers if outputs_of(model.get_submodule(path)) > 1]
    return [path for path in several if path not in cut | listed | inner]


def outputs_of(layer: nn.Module) -> int:
    """The number of channels that a convolution or linear layer makes."""
    return int(getattr(layer, "out_channels", None) or getattr(layer, "out_features", 0))


def difference_of(
    model: nn.Module, groups: list[Group], inputs: Inputs, raw: Callable[[nn.Module], nn.Module]
) -> float:
    """The largest difference of gated and cut models for some random widths, relative to the largest output."""
    worst = 0.0
    with torch.no_grad(), Student(model, groups) as student:
        for seed in range(KEEPS):
            keep = draw(groups, seed)
            cut = raw(materialize(model, groups, keep).eval())(*inputs)
            with student.hard_gated(keep):
                found = compare_outputs(raw(student)(*inputs), cut)
            worst = max(worst, found["max_abs_diff"] / max(found["max_abs_logit"], 1e-9))
    return worst


def _double(inputs: Inputs) -> Inputs:
    return tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)


def examine(name: str) -> dict[str, Any]:
    """Prune one network."""
    torch.set_num_threads(1)
    adapter = adapter_of(name)
    model = randomised(adapter.skeleton())
    inputs, raw = adapter.example_inputs(Shape(2)), adapter.raw
    start = time.perf_counter()
    try:
        groups = adapter.groups(model)
    except ValueError as error:
        return {"status": "refused", "reason": str(error)}
    seconds = time.perf_counter() - start
    half = {group.name: 1 if group.removes else max(1, group.full_width // 2) for group in groups}
    left = count_parameters(materialize(model, groups, keep_first(groups, half))) / count_parameters(model)
    worst = difference_of(model, groups, inputs, raw)
    rounding = worst > EXACT and difference_of(model.double(), groups, _double(inputs), raw) <= EXACT_IN_DOUBLE
    kinds: dict[str, int] = {}
    for group in groups:
        kinds[group.kind] = kinds.get(group.kind, 0) + 1
    return {
        "status": "exact" if worst <= EXACT or rounding else "wrong",
        "difference": worst,
        "exact_in_float64_only": rounding,
        "left": round(left, 4),
        "seconds": round(seconds, 2),
        "groups": kinds,
        "kept": {f"{kept.kind} {kept.reason}": kept.units for kept in adapter.kept_whole(model) if kept.remedy},
        "unlisted": unlisted(adapter, model),
    }


def torch_pruning(name: str) -> dict[str, Any]:
    """The share of the parameters that Torch-Pruning leaves at a pruning ratio of one half."""
    import torch_pruning as tp  # the baseline, an optional package

    torch.set_num_threads(1)
    adapter = adapter_of(name)
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
    """The classification, segmentation, detection and video models of torchvision."""
    rooms = (
        torchvision.models,
        *(getattr(torchvision.models, name) for name in ("segmentation", "detection", "video")),
    )
    return [f"torchvision:{name}" for room in rooms for name in torchvision.models.list_models(room)]


def line(name: str, method: str, found: dict[str, Any]) -> str:
    """What came of one network, in words."""
    if "left" not in found:
        return f"{name:42} {method:13} {found['status']} {found.get('reason', '')[:90]}"
    exact = f", {found['difference']:.0e}, {found['seconds']:.1f} s" if "difference" in found else ""
    return f"{name:42} {method:13} {found['status']} {found['left']:.2f} left{exact}"


def table(known: dict[str, Any]) -> str:
    """The page docs/breadth.md: a row for each network."""
    networks, environment = known["networks"], known["environment"]
    ours = [network["hawada"] for network in networks.values() if "hawada" in network]
    far = sum(found["status"] == "exact" and found["left"] <= GOAL for found in ours)
    lines = [
        "# Which networks can be pruned, and how far",
        "",
        "Written by `benchmarks/breadth.py --table` from `benchmarks/results/breadth_cpu.json`: torch "
        f"{environment['torch']}, timm {environment['timm']}, one core of {environment['machine']} beside other work.",
        "",
        f"Of {len(ours)} networks {sum(found['status'] == 'exact' for found in ours)} are exact, {far} of them with at "
        f"most {GOAL} of the parameters left when every branch stays and every width is half. A difference in float32 "
        "above 1e-5 counts as rounding where it is at most 1e-10 in float64. `—` stands where Torch-Pruning fails, or "
        "was not tried. The rows were measured while rules were added; those that a later rule freed were measured "
        "again.",
        "",
        "| network | status | left | Torch-Pruning | seconds | what keeps its channels |",
        "|---|---|---|---|---|---|",
    ]
    for name, network in networks.items():
        found, other = network.get("hawada"), network.get("torch_pruning", {})
        if found is None:
            continue
        why = "; ".join(list(found.get("kept", {}))[:2]) or found.get("reason", "")[:120]
        left, seconds = (f"{found[key]:.2f}" if key in found else "—" for key in ("left", "seconds"))
        theirs = f"{other['left']:.2f}" if "left" in other else "—"
        lines.append(f"| {name.replace(':', ' ')} | {found['status']} | {left} | {theirs} | {seconds} | {why} |")
    return "\n".join(lines) + "\n"


METHODS = {"hawada": examine, "torch_pruning": torch_pruning}


def main() -> None:
    """Examine every network that the output does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="examine one network in this process")
    parser.add_argument("--method", choices=tuple(METHODS), default="hawada")
    parser.add_argument("--torchvision", action="store_true", help="torchvision's models too")
    parser.add_argument("--table", type=Path, help="write the page from what the output holds, and measure nothing")
    parser.add_argument("--output", type=Path, default=Path("breadth.json"))
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(METHODS[arguments.method](arguments.one)))
        return
    if arguments.table:
        arguments.table.write_text(table(json.loads(arguments.output.read_text())))
        return
    import timm  # an optional package

    known = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"networks": {}}
    known["environment"] = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    names = smallest_of_timm() + (of_torchvision() if arguments.torchvision else [])
    for method in METHODS:
        for name in names:
            network = known["networks"].setdefault(name, {})
            if method not in network:
                network[method] = in_a_process(name, method)
                arguments.output.write_text(json.dumps(known, indent=1) + "\n")
                print(line(name, method, network[method]), flush=True)
    found = [network["hawada"] for network in known["networks"].values() if "hawada" in network]
    exact = [network for network in found if network["status"] == "exact"]
    far = [network for network in exact if network["left"] <= GOAL]
    print(f"{len(found)} networks: {len(exact)} exact, {len(far)} of them with at most {GOAL} of the parameters left")


if __name__ == "__main__":
    main()
