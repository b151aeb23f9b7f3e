"""What a stage works with, made from its configuration when it is first asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from omegaconf import DictConfig, OmegaConf
from torch import nn

from hawada.adapters import Adapter, GroupFilter, Shape, load_model, save_model, select_groups
from hawada.config import build
from hawada.core.gates import SigmoidGate
from hawada.core.latency import (
    Budget,
    Clock,
    Comparison,
    DeviceMonitor,
    LatencyTable,
    Monitor,
    Proxy,
    Rounds,
    compare,
    environment,
    prepare_cpu,
    resolve_device,
    source_of,
)
from hawada.core.structure import ExportPolicy, Group, Inputs, Keep, Rounding, Site
from hawada.data import TextData, VisionData
from hawada.experiment import Run, write_json

# Relative width of the band below the target, where the budget does not set one: a CPU cannot be timed as sharply.
TOLERANCE = {"cuda": 0.03}
TOLERANCE_ELSEWHERE = 0.06
# How sharply and how long a comparison is measured, likewise.
ROUNDS = {"cuda": {"precision": 0.005, "max_rounds": 400}}
ROUNDS_ELSEWHERE = {"precision": 0.006, "max_rounds": 400}
# Where many figures make up for each other's errors.
QUICK = Rounds(precision=0.01, max_rounds=80, max_seconds=8.0, patience_s=3.0)
NEW_TOKENS = 32  # that a language model generates before it is saved and after it is loaded again


class Workspace:
    """Adapter, models, data, clock and budget of one stage.

    Args:
        cfg: the part of the configuration that the stage reads.
        run: the run directory.
    """

    def __init__(self, cfg: DictConfig, run: Run) -> None:
        self.cfg, self.run = cfg, run
        prepare_cpu(cfg.runtime.threads)
        set_seed(cfg.seed)

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
        return Accelerator(cpu=self.device.type == "cpu", mixed_precision=self.cfg.compute.mixed_precision)

    @cached_property
    def adapter(self) -> Adapter:
        """The model family."""
        return build(self.cfg.model.adapter)

    @property
    def adapter_spec(self) -> dict[str, Any]:
        """What a saved model's manifest needs to rebuild the architecture: no weights, no local path."""
        spec: dict[str, Any] = OmegaConf.to_container(self.cfg.model.adapter, resolve=True)  # type: ignore[assignment]
        return {key: value for key, value in spec.items() if key not in ("weights", "path")}

    @property
    def trust(self) -> list[str]:
        """The code that this configuration itself names: what it saved may import it."""
        spec = self.adapter_spec
        return [spec["_target_"], *(spec[key] for key in self.adapter.imports if spec.get(key) is not None)]

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

    def check_groups(self) -> None:
        """Check that some group is gated, and that the layout can hold what gating leads to.

        Raises:
            ValueError: naming the key to change.
        """
        self.adapter.check_layout(self.cfg.export.layout, self.groups)
        gated = {group.name for group in self.gated_groups}
        for members in self.policy.shared(self.groups):
            chosen = [member.name for member in members if member.name in gated]
            if chosen and len(chosen) < len(members):
                left_out = next(member.name for member in members if member.name not in gated)
                raise ValueError(
                    f"groups: {chosen[0]} would be gated and {left_out} not, but export.layout=uniform needs the same "
                    "width for both; gate all of a kind, or set export.layout=heterogeneous"
                )

    @cached_property
    def sites(self) -> list[Site]:
        """What the latency table times."""
        return self.adapter.sites(self.meta)

    @cached_property
    def data(self) -> VisionData | TextData:
        """The data set.

        Raises:
            ValueError: when its images, text or labels are not what the model takes.
        """
        target = self.cfg.data["_target_"]
        wants_tokenizer = "tokenizer" in inspect.signature(resolve_name(target)).parameters
        if wants_tokenizer != (self.adapter.modality == "text"):
            raise ValueError(
                f"data: {target} is not {self.adapter.modality} data, which {self.cfg.model.name} takes; "
                "choose among stdlib, wikitext, slimpajama, text (text) and digits, cifar10, imagenet (image)"
            )
        if wants_tokenizer:
            return self._text()
        own = self.adapter.normalisation()
        takes = own is not None and {"mean", "std"} <= set(inspect.signature(resolve_name(target)).parameters)
        data: VisionData = build(
            self.cfg.data, **(dict(zip(("mean", "std"), own, strict=True)) if own and takes else {})
        )
        images, _ = next(iter(data.calibration_loader(1, 1)))
        example = self.adapter.example_inputs(Shape(1))
        if images.shape[1:] != example[0].shape[1:]:
            raise ValueError(
                f"data: images of shape {tuple(images.shape[1:])} do not fit a model whose latency is optimised for "
                f"{tuple(example[0].shape[1:])}; set data.image_size and the model's image size to the same"
            )
        classes = self.classes(self.adapter, self.meta)
        if data.classes > classes:
            raise ValueError(
                f"data: {data.classes} classes do not fit a model with {classes}; "
                f"set the model's number of classes to {data.classes}"
            )
        return data.resident(self.device) if isinstance(data, VisionData) and self.device.type != "cpu" else data

    def _text(self) -> TextData:
        data: TextData = build(self.cfg.data, tokenizer=self.adapter.tokenizer())
        known = self.classes(self.adapter, self.meta)
        if data.vocabulary > known:
            raise ValueError(
                f"data: the tokenizer has {data.vocabulary} tokens and the model knows {known}; "
                "use the tokenizer that belongs to the checkpoint"
            )
        return data

    def classes(self, adapter: Adapter, meta: nn.Module) -> int:
        """How many classes, or tokens, a model tells apart when it is shown what ours is; found on shapes alone."""
        example = self.adapter.example_inputs(Shape(1, prompt=8))
        with torch.no_grad():
            return adapter.logits(meta(*(x.to("meta") for x in example))).shape[-1]

    def teacher(self) -> nn.Module:
        """A fresh copy of the pretrained model, in eval mode on the CPU."""
        if self.cfg.model.pretrain:
            return self.saved_model("pretrain", "teacher")
        return self.adapter.teacher()

    def saved_model(self, stage: str, name: str) -> nn.Module:
        """A model that a stage saved."""
        return load_model(self.run.folder(stage) / name, self.trust)

    def new_gate(self, units: int) -> SigmoidGate:
        """A gate as configured."""
        return build(self.cfg.gate, shape=units)

    @cached_property
    def clock(self) -> Clock:
        """What takes the time: the device's clock, a simulated device, or one of the user's."""
        return build(self.cfg.gpu.simulated if self.cfg.gpu.timing == "simulated" else self.cfg.gpu.clock)

    @cached_property
    def monitor(self) -> Monitor | None:
        """What watches the device between rounds; nothing does where nothing runs."""
        if source_of(self.clock) != "measured":
            return None
        profiled = self.run.result("profile") if self.run.is_finished("profile") else {}
        return DeviceMonitor(self.device, handover_us=profiled.get("handover_us"))

    @property
    def handover_us(self) -> float | None:
        """How near to each other the threads of a CPU run at best, see `hawada.core.latency.placement`."""
        return self.monitor.handover_us if isinstance(self.monitor, DeviceMonitor) else None

    @cached_property
    def rounds(self) -> Rounds:
        """How long a comparison is measured; once is enough where nothing varies."""
        if source_of(self.clock) != "measured" and not getattr(self.clock, "noise", 0.0):
            return Rounds(min_rounds=1, max_rounds=1)
        node, defaults = self.cfg.measure, ROUNDS.get(self._kind, ROUNDS_ELSEWHERE)
        return build(node, **{key: value for key, value in defaults.items() if node.get(key, value) is None})

    @property
    def quick_rounds(self) -> Rounds:
        """Likewise for tables and probes, which a fit smooths."""
        rounds = self.rounds
        return replace(
            rounds,
            precision=max(rounds.precision, QUICK.precision),
            max_rounds=min(rounds.max_rounds, QUICK.max_rounds),
            max_seconds=min(rounds.max_seconds, QUICK.max_seconds),
            patience_s=min(rounds.patience_s, QUICK.patience_s),
        )

    @property
    def confirmations(self) -> int:
        """How often a search measures again what is on target; what nothing disturbs is the same again."""
        return 0 if self.cfg.gpu.timing == "table" or self.rounds.max_rounds == 1 else 1

    @property
    def _kind(self) -> str:
        """The kind of device that latencies are of, be it here or simulated."""
        return self.device.type if self.cfg.gpu.device == "auto" else self.cfg.gpu.device

    @property
    def batch(self) -> int:
        """Batch size whose latency is optimised: `budget.batch`, else the model's for this kind of device."""
        return self.cfg.budget.batch or self.cfg.model.batch[self._kind]

    @cached_property
    def shape(self) -> Shape:
        """What one timed call is made of."""
        node = self.cfg.budget
        return Shape(self.batch, node.phase, node.prompt, node.new_tokens)

    @property
    def timed_as(self) -> dict[str, Any]:
        """What a latency is the latency of."""
        cfg = self.cfg
        what = {"device": self.device.type, "dtype": cfg.gpu.dtype, "runtime": cfg.runtime.mode}
        what["phase"] = self.shape.phase
        tokens = {"prompt": self.shape.prompt, "new_tokens": self.shape.new_tokens}
        return what | {"batch": self.batch} | (tokens if self.adapter.modality == "text" else {})

    def inputs(self, shape: Shape | None = None) -> Inputs:
        """Inputs of one timed call, in dtype and on the device that is timed."""
        example = self.adapter.example_inputs(shape or self.shape)
        return tuple(x.to(self.device, self.dtype if x.is_floating_point() else None) for x in example)

    def check_inputs(self) -> Inputs:
        """A few inputs of a plain forward pass, in float32 on the CPU, for comparing models."""
        return self.adapter.example_inputs(Shape(4, "forward", 32))

    def answers(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What a model says to `check_inputs`: logits, and for a language model the tokens that it goes on with."""
        inputs = self.check_inputs()
        with torch.no_grad():
            said = {"logits": self.adapter.logits(model(*inputs)).contiguous()}
            tokens = self.adapter.greedy_tokens(model, inputs, NEW_TOKENS)
        return said if tokens is None else said | {"tokens": tokens.contiguous()}

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the models that are timed."""
        return getattr(torch, self.cfg.gpu.dtype)

    def placed(self, model: nn.Module) -> nn.Module:
        """A model in eval mode, on the device and in the dtype that are timed. Moves the given one."""
        return model.to(self.device, self.dtype).eval()

    def timed(self, model: nn.Module, shape: Shape | None = None) -> nn.Module:
        """What is timed of a model: the phase's call of it, placed. Moves the given one."""
        return self.adapter.workload(self.placed(model), shape or self.shape)

    def slim(self, model: nn.Module, keep: Keep) -> nn.Module:
        """A smaller copy of a model with only the kept units."""
        return self.adapter.slim(model, self.groups, keep)

    def compare(
        self, teacher: nn.Module, candidate: nn.Module, rounds: Rounds | None = None, shape: Shape | None = None
    ) -> Comparison:
        """Interleaved latency of two models that are already as they are timed."""
        return compare(
            teacher,
            candidate,
            self.inputs(shape),
            self.clock,
            rounds=rounds or self.rounds,
            seed=self.cfg.seed,
            monitor=self.monitor,
        )

    def save(self, path: Path, model: nn.Module, keep: Keep) -> None:
        """Save a model that was sliced to `keep`."""
        written = save_model(
            path,
            model,
            adapter=self.adapter,
            adapter_spec=self.adapter_spec,
            teacher=self.meta,
            groups=self.groups,
            keep=keep,
        )
        self.run.record(written)

    @cached_property
    def budget(self) -> Budget:
        """The target, with the tolerance that the device allows."""
        return self.budget_for(self.cfg.budget.target_ratio)

    def budget_for(self, target_ratio: float | None) -> Budget:
        """The same for another fraction of the teacher's time."""
        node = self.cfg.budget
        tolerance = node.tolerance or TOLERANCE.get(self.device.type, TOLERANCE_ELSEWHERE)
        return Budget(node.target_ms, target_ratio, tolerance)

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
                dict(self.cfg.export.minimum),  # plain: the search asks it thousands of times
                uniform=self.cfg.export.layout == "uniform",
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
