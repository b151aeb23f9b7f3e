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
from accelerate.state import AcceleratorState
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
        """Where models train and are timed.

        A stage that measures nothing, or on a simulated device, takes what is here when `gpu.device` is not.
        """
        wanted, gpu = self.cfg.gpu.device, self.cfg.gpu
        if gpu.get("timing") == "measured":
            return resolve_device(wanted, match=gpu.match)
        return resolve_device(wanted if wanted == "cpu" else "auto")

    @cached_property
    def accelerator(self) -> Accelerator:
        """Placement and mixed precision of training."""
        AcceleratorState._reset_state(True)  # it is global, and an earlier stage or job may have chosen otherwise
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
        """The data set.

        Raises:
            ValueError: when its images or labels are not what the model takes.
        """
        data: VisionData = build(self.cfg.data)
        images, _ = next(iter(data.calibration_loader(1, 1)))
        example = self.adapter.example_inputs(1)
        if images.shape[1:] != example[0].shape[1:]:
            raise ValueError(
                f"data: images of shape {tuple(images.shape[1:])} do not fit a model whose latency is optimised for "
                f"{tuple(example[0].shape[1:])}; set data.image_size and model.adapter.image_size to the same"
            )
        classes = self.adapter.logits(self.meta(*(x.to("meta") for x in example))).shape[-1]
        if data.classes > classes:
            raise ValueError(
                f"data: {data.classes} classes do not fit a model with {classes}; "
                f"set model.adapter.num_classes={data.classes}"
            )
        return data

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

    @property
    def batch(self) -> int:
        """Batch size whose latency is optimised: `budget.batch`, else the model's for this kind of device."""
        kind = self.device.type if self.cfg.gpu.device == "auto" else self.cfg.gpu.device
        return self.cfg.budget.batch or self.cfg.model.batch[kind]

    @property
    def timed_as(self) -> dict[str, Any]:
        """What a latency is the latency of."""
        return {"device": self.device.type, "dtype": self.cfg.gpu.dtype, "batch": self.batch, "runtime": "eager"}

    @cached_property
    def inputs(self) -> Inputs:
        """Inputs of the shape, dtype and device whose latency is optimised."""
        example = self.adapter.example_inputs(self.batch)
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

    @cached_property
    def policies(self) -> list[ExportPolicy]:
        """Sets of allowed widths, the finest first: one for each place in the lists of `gpu.multiple`."""
        listed = {kind: sorted(_listed(values)) for kind, values in self.cfg.gpu.multiple.items()}
        levels = max((len(values) for values in listed.values()), default=1)
        threshold = self.cfg.export.threshold if "threshold" in self.cfg.export else 0.5
        return [
            ExportPolicy(
                threshold,
                {kind: Rounding(values[min(level, len(values) - 1)]) for kind, values in listed.items()},
                self.cfg.export.minimum,
            )
            for level in range(levels)
        ]

    @property
    def policy(self) -> ExportPolicy:
        """Every width that is allowed at all."""
        return self.policies[0]

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
