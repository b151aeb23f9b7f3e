"""How latencies are taken: by which clock, for how long, and what one timed call is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from hawada.adapters import Shape
from hawada.config import build
from hawada.core.latency import (
    Budget,
    Clock,
    DeviceMonitor,
    Monitor,
    Rounds,
    Sampled,
    compare,
    measure_rounds,
    source_of,
)
from hawada.core.structure import Inputs
from hawada.core.verdict import Comparison
from hawada.workspace.device import configured_device
from hawada.workspace.store import Store
from hawada.workspace.subject import Subject

# Relative width of the band below the target, where the budget does not set one: a CPU cannot be timed as sharply.
TOLERANCE = {"cuda": 0.03}
TOLERANCE_ELSEWHERE = 0.06
# How sharply and how long a comparison is measured, likewise.
ROUNDS = {"cuda": {"precision": 0.005, "max_rounds": 400}}
ROUNDS_ELSEWHERE = {"precision": 0.006, "max_rounds": 400}
# Where many figures make up for each other's errors.
QUICK_ROUNDS = Rounds(precision=0.01, max_rounds=80, max_seconds=8.0, patience_s=3.0)


class Stopwatch:
    """Clock, monitor and rounds, as every stage that measures has them.

    Args:
        cfg: the part of the configuration that the stage reads.
        store: the run, in which the profiled teacher may have shown how near to each other a CPU's threads run.
    """

    def __init__(self, cfg: DictConfig, store: Store) -> None:
        self.cfg, self.store = cfg, store

    @cached_property
    def device(self) -> torch.device:
        """Where models are timed."""
        return configured_device(self.cfg.gpu)

    @property
    def kind(self) -> str:
        """The kind of device that latencies are of, be it here or simulated."""
        device: str = self.cfg.gpu.device
        return self.device.type if device == "auto" else device

    @cached_property
    def clock(self) -> Clock:
        """What takes the time: the device's clock, a simulated device, or one of the user's."""
        clock: Clock = build(self.cfg.gpu.simulated if self.cfg.gpu.timing == "simulated" else self.cfg.gpu.clock)
        return clock

    def clock_of(self, runtime: str) -> Clock:
        """The device's clock for another runtime than the configured one."""
        clock: Clock = build(self.cfg.gpu.clock, runtime=runtime)
        return clock

    @cached_property
    def monitor(self) -> Monitor | None:
        """What watches the device between rounds; nothing does where nothing runs."""
        if source_of(self.clock) != "measured":
            return None
        return DeviceMonitor(self.device, handover_us=self.store.profiled_handover_us())

    @property
    def handover_us(self) -> float | None:
        """How near to each other the threads of a CPU run at best, see `hawada.core.latency.placement`."""
        return self.monitor.handover_us if isinstance(self.monitor, DeviceMonitor) else None

    @cached_property
    def rounds(self) -> Rounds:
        """How long a comparison is measured; once is enough where nothing varies."""
        if source_of(self.clock) != "measured" and not getattr(self.clock, "noise", 0.0):
            return Rounds(min_rounds=1, max_rounds=1)
        node, defaults = self.cfg.measure, ROUNDS.get(self.kind, ROUNDS_ELSEWHERE)
        rounds: Rounds = build(node, **{key: value for key, value in defaults.items() if node.get(key, value) is None})
        return rounds

    @property
    def quick_rounds(self) -> Rounds:
        """Likewise for tables and probes, which a fit smooths."""
        rounds = self.rounds
        return replace(
            rounds,
            precision=max(rounds.precision, QUICK_ROUNDS.precision),
            max_rounds=min(rounds.max_rounds, QUICK_ROUNDS.max_rounds),
            max_seconds=min(rounds.max_seconds, QUICK_ROUNDS.max_seconds),
            patience_s=min(rounds.patience_s, QUICK_ROUNDS.patience_s),
        )

    @property
    def confirmations(self) -> int:
        """How often a search measures again what is on target; what nothing disturbs is the same again."""
        return 0 if self.cfg.gpu.timing == "table" or self.rounds.max_rounds == 1 else 1

    def compare(
        self, baseline: nn.Module, candidate: nn.Module, inputs: Inputs, rounds: Rounds | None = None
    ) -> Comparison:
        """Interleaved latency of two models that are already as they are timed."""
        return compare(
            baseline,
            candidate,
            inputs,
            self.clock,
            rounds=rounds or self.rounds,
            seed=self.cfg.seed,
            monitor=self.monitor,
        )

    def sample(self, samplers: Sequence[Callable[[], float]], rounds: Rounds) -> Sampled:
        """Milliseconds in the same interleaved rounds; the first sampler is the baseline."""
        return measure_rounds(samplers, rounds, seed=self.cfg.seed, monitor=self.monitor)

    @cached_property
    def budget(self) -> Budget:
        """The target, with the tolerance that the device allows."""
        return self.budget_for(self.cfg.budget.target_ratio)

    def budget_for(self, target_ratio: float | None) -> Budget:
        """The same for another fraction of the teacher's time."""
        node = self.cfg.budget
        tolerance = node.tolerance or TOLERANCE.get(self.device.type, TOLERANCE_ELSEWHERE)
        return Budget(node.target_ms, target_ratio, tolerance)


class ModelStopwatch(Stopwatch):
    """A stopwatch for the calls of one family's models.

    Args:
        cfg: the part of the configuration that the stage reads.
        store: the run, see `Stopwatch`.
        subject: whose calls are timed.
    """

    def __init__(self, cfg: DictConfig, store: Store, subject: Subject) -> None:
        super().__init__(cfg, store)
        self.subject = subject

    @property
    def batch(self) -> int:
        """Batch size whose latency is optimised: `budget.batch`, else the model's for this kind of device."""
        batch: int = self.cfg.budget.batch or self.cfg.model.batch[self.kind]
        return batch

    @cached_property
    def shape(self) -> Shape:
        """What one timed call is made of."""
        node = self.cfg.budget
        return Shape(self.batch, node.phase, node.prompt, node.new_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the models that are timed."""
        dtype: torch.dtype = getattr(torch, self.cfg.gpu.dtype)
        return dtype

    @property
    def timed_as(self) -> dict[str, Any]:
        """What a latency is the latency of."""
        cfg = self.cfg
        what = {"device": self.device.type, "dtype": cfg.gpu.dtype, "runtime": cfg.runtime.mode}
        what["phase"] = self.shape.phase
        tokens = {"prompt": self.shape.prompt, "new_tokens": self.shape.new_tokens}
        return what | {"batch": self.batch} | (tokens if self.subject.adapter.modality == "text" else {})

    def inputs(self, shape: Shape | None = None) -> Inputs:
        """Inputs of one timed call, in dtype and on the device that is timed."""
        example = self.subject.adapter.example_inputs(shape or self.shape)
        return tuple(x.to(self.device, self.dtype if x.is_floating_point() else None) for x in example)

    def placed(self, model: nn.Module) -> nn.Module:
        """A model in eval mode, on the device and in the dtype that are timed. Moves the given one."""
        return model.to(self.device, self.dtype).eval()

    def timed(self, model: nn.Module, shape: Shape | None = None) -> nn.Module:
        """What is timed of a model: the phase's call of it, placed. Moves the given one."""
        return self.subject.adapter.workload(self.placed(model), shape or self.shape)
