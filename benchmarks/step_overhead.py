"""What gates cost in training: a step of the trainer is compared with a loop without gates that does the least work.

    python benchmarks/step_overhead.py --output benchmarks/results/step_overhead_cpu.json

Both have frozen weights, ResNet-18, batch 64 at 3 x 64 x 64 (other sizes by options). The bare loop runs the teacher,
the student, and a backward pass to the activations at the first gate; the trainer does that with gates, penalties, the
latency proxy and an optimizer step. Their steps take turns; the figure is the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hawada.adapters import Shape
from hawada.adapters.torchvision import ResNetAdapter
from hawada.core.distill import Distillation, KDConfig
from hawada.core.gates import FloorCeiling, Student
from hawada.core.latency import (
    LatencyProxy,
    Rounds,
    SimulatedClock,
    bootstrap_median,
    build_table,
    environment,
    prepare_cpu,
)
from hawada.core.latency.profiler import measure_rounds
from hawada.core.structure import ExportPolicy, full_widths
from hawada.core.train import LagrangeTrainer


def gated_step(adapter: ResNetAdapter, teacher: nn.Module, inputs: Tensor, accelerator: Accelerator) -> Any:
    """Make one complete step of gate training."""
    groups, sites = adapter.groups(teacher), adapter.sites(teacher)
    clock = SimulatedClock(tflops=1.0, gbps=100.0, launch_us=5.0, tile=8, noise=0.0)
    table = build_table(teacher, groups, sites, [(1.0, teacher, (inputs[:2],))], clock, policy=ExportPolicy(), points=3)
    proxy = LatencyProxy(table)
    student = Student(copy.deepcopy(teacher), groups)
    full_ms = float(proxy.predict(full_widths(groups)))
    trainer = LagrangeTrainer(
        student,
        copy.deepcopy(teacher),
        proxy=proxy,
        gate_optimizer=torch.optim.Adam(student.gates.parameters(), lr=0.01),
        distillation=Distillation(KDConfig()),
        penalties=[FloorCeiling()],
        groups=groups,
        target_ms=0.6 * full_ms,
        teacher_ms=full_ms,
        accelerator=accelerator,
    )
    return lambda: trainer.train_epoch([(inputs,)])


def bare_step(adapter: ResNetAdapter, teacher: nn.Module, inputs: Tensor, accelerator: Accelerator) -> Any:
    """Make a step of teacher and student forward, and backward to where the first gate would be."""
    loss = KDConfig()
    student = copy.deepcopy(teacher).to(accelerator.device).requires_grad_(False)
    original = copy.deepcopy(teacher).to(accelerator.device).requires_grad_(False)
    inputs = inputs.to(accelerator.device)
    first = next(group for group in adapter.groups(teacher) if group.gated_at[0].side == "input").gated_at[0]

    def begin(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].requires_grad_(True)

    student.get_submodule(first.module).register_forward_pre_hook(begin)

    def step() -> None:
        with torch.no_grad():
            targets = original(inputs)
        loss(student(inputs), targets).backward()

    return step


def milliseconds(step: Callable[[], Any], device: torch.device) -> float:
    """Time one step in milliseconds, until the device has finished it."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    prepare_cpu(None)
    torch.manual_seed(0)
    accelerator = Accelerator()
    adapter = ResNetAdapter(arguments.arch, image_size=arguments.size)
    teacher = adapter.skeleton()
    inputs = adapter.example_inputs(Shape(arguments.batch))[0]
    steps = [make(adapter, teacher, inputs, accelerator) for make in (bare_step, gated_step)]

    for step in steps:
        step()
    rounds = Rounds(precision=0.005, min_rounds=20, max_rounds=400, max_seconds=arguments.seconds)
    samples = measure_rounds(
        [lambda step=step: milliseconds(step, accelerator.device) for step in steps], rounds
    ).samples
    ratio = bootstrap_median(samples[:, 1] / samples[:, 0])
    whole = {
        "arch": arguments.arch,
        "shape": list(inputs.shape),
        "ratio": ratio.as_dict(),
        "bare_ms": bootstrap_median(samples[:, 0]).as_dict(),
        "gated_ms": bootstrap_median(samples[:, 1]).as_dict(),
        "rounds": len(samples),
        "environment": environment(accelerator.device),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(whole, indent=1) + "\n")
    print(
        f"{arguments.arch}, {tuple(inputs.shape)}: a step with gates takes {ratio.median:.3f} "
        f"[{ratio.low:.3f}, {ratio.high:.3f}] of one without; {json.dumps(whole['environment'])}"
    )


if __name__ == "__main__":
    main()
