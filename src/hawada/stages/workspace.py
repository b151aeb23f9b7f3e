"""What a stage works with, made from its configuration when it is first asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from torch import nn

from hawada.adapters.attach import GroupFilter, select_groups
from hawada.adapters.base import Adapter, load_model
from hawada.config import build
from hawada.core.budget import Budget
from hawada.core.device import environment, prepare_cpu, resolve_device
from hawada.core.export import ExportPolicy, Rounding
from hawada.core.gates import SigmoidGate
from hawada.core.profiler import Clock, Comparison, Inputs, Rounds, compare
from hawada.core.proxy_cost import LatencyTable, Proxy
from hawada.core.structure import Group, Site
from hawada.data.vision import VisionData
from hawada.run import Run, write_json

# Relative width of the band below the target, where the budget does not set one: a CPU cannot be timed as sharply.
TOLERANCE = {"cuda": 0.03}
TOLERANCE_ELSEWHERE = 0.06


class Workspace:
    """Adapter, models, data, clock and budget of one stage.

    Args:
        cfg: the part of the configuration that the stage reads.
        run: the run directory.
    """

    def __init__(self, cfg: DictConfig, run: Run) -> None:
        self.cfg, self.run = cfg, run
        prepare_cpu(cfg.runtime.threads)
        random.seed(cfg.seed)
        np.random.seed(cfg.seed)
        torch.manual_seed(cfg.seed)

    @cached_property
    def device(self) -> torch.device:
        """Where models train and are timed; a simulated device leaves that to what is here."""
        wanted = self.cfg.gpu.device if "gpu" in self.cfg else "auto"
        if "gpu" in self.cfg and self.cfg.gpu.timing == "simulated":
            wanted = "auto"
        return resolve_device(wanted)

    @cached_property
    def accelerator(self) -> Accelerator:
        """Placement and mixed precision of training."""
        return Accelerator(cpu=self.device.type == "cpu", mixed_precision=self.cfg.runtime.mixed_precision)

    @cached_property
    def adapter(self) -> Adapter:
        """The model family."""
        return build(self.cfg.model.adapter)

    @property
    def adapter_spec(self) -> dict[str, Any]:
        """What a saved model's manifest needs to rebuild the architecture: no weights, no local path."""
        spec: dict[str, Any] = OmegaConf.to_container(self.cfg.model.adapter, resolve=True)  # type: ignore[assignment]
        return {key: value for key, value in spec.items() if key not in ("weights", "path")}

    @cached_property
    def meta(self) -> nn.Module:
        """The architecture without numbers."""
        with torch.device("meta"):
            return self.adapter.skeleton()

    @cached_property
    def groups(self) -> list[Group]:
        """Everything that may be removed."""
        return self.adapter.groups(self.meta)

    @cached_property
    def gated_groups(self) -> list[Group]:
        """The groups that pass `groups.name` and `groups.kind`."""
        chosen = self.cfg.groups
        return select_groups(self.groups, self.meta, GroupFilter(chosen.name, chosen.kind))

    @cached_property
    def sites(self) -> list[Site]:
        """What the latency table times."""
        return self.adapter.sites(self.meta)

    @cached_property
    def data(self) -> VisionData:
        """The data set."""
        return build(self.cfg.data)

    def teacher(self) -> nn.Module:
        """A fresh copy of the pretrained model, in eval mode on the CPU."""
        if self.cfg.model.pretrain:
            return self.saved_model("pretrain", "teacher")
        return self.adapter.teacher()

    def saved_model(self, stage: str, name: str) -> nn.Module:
        """A model that a stage saved."""
        target = self.cfg.model.adapter["_target_"]
        return load_model(self.run.folder(stage) / name, trust=[target])

    def new_gate(self, units: int) -> SigmoidGate:
        """A gate as configured."""
        return build(self.cfg.gate, shape=units)

    @cached_property
    def clock(self) -> Clock:
        """What takes the time: the device's clock, a simulated device, or one of the user's."""
        return build(self.cfg.gpu.simulated if self.cfg.gpu.timing == "simulated" else self.cfg.gpu.clock)

    @cached_property
    def rounds(self) -> Rounds:
        """How long a comparison is measured."""
        if self.clock.simulated:
            return Rounds(min_rounds=1, max_rounds=1)
        return build(self.cfg.measure)

    @cached_property
    def inputs(self) -> Inputs:
        """Inputs of the shape, dtype and device whose latency is optimised."""
        example = self.adapter.example_inputs(self.cfg.budget.batch)
        return tuple(x.to(self.device, self.dtype if x.is_floating_point() else None) for x in example)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the models that are timed."""
        return getattr(torch, self.cfg.gpu.dtype)

    def timed(self, model: nn.Module) -> nn.Module:
        """A model as it is timed: eval mode, on the device, in the dtype. Moves the given one."""
        return model.to(self.device, self.dtype).eval()

    def compare(self, teacher: nn.Module, candidate: nn.Module, rounds: Rounds | None = None) -> Comparison:
        """Interleaved latency of two models that are already as they are timed."""
        return compare(teacher, candidate, self.inputs, self.clock, rounds=rounds or self.rounds, seed=self.cfg.seed)

    @cached_property
    def budget(self) -> Budget:
        """The target, with the tolerance that the device allows."""
        node = self.cfg.budget
        tolerance = node.tolerance or TOLERANCE.get(self.device.type, TOLERANCE_ELSEWHERE)
        return Budget(node.target_ms, node.target_ratio, tolerance)

    def policy(self, multiple: int | None = None) -> ExportPolicy:
        """Allowed widths; by kind the given multiple, else the smallest that the device lists."""
        rounding = {kind: Rounding(multiple or min(_listed(values))) for kind, values in self.cfg.gpu.multiple.items()}
        threshold = self.cfg.export.threshold if "threshold" in self.cfg.export else 0.5
        return ExportPolicy(threshold, rounding, self.cfg.export.minimum)

    @cached_property
    def multiples(self) -> list[int]:
        """Every rounding multiple that the device lists for a kind that this model has."""
        kinds = {group.kind for group in self.groups}
        listed = {v for kind, values in self.cfg.gpu.multiple.items() if kind in kinds for v in _listed(values)}
        return sorted(listed) or [1]

    def new_proxy(self, table: LatencyTable) -> Proxy:
        """The latency proxy as configured, without samples."""
        return build(self.cfg.proxy, table=table)

    def environment(self) -> dict[str, Any]:
        """Machine and versions."""
        return environment(self.device)

    @contextmanager
    def writing(self, stage: str) -> Iterator[Path]:
        """The stage's empty folder, with its configuration and a record of the environment."""
        with self.run.writing(stage) as folder:
            write_json(folder / "environment.json", self.environment())
            yield folder

    def absolute(self, path: Path) -> str:
        """A path as results name it."""
        return str(path.resolve())


def _listed(values: Any) -> list[int]:
    return list(values) if OmegaConf.is_list(values) else [values]
