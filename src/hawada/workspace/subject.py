"""The model of a stage: its adapter, its weights, what may be removed from it, and the data that it takes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils import _pytree as pytree

from hawada.adapters import Adapter, GroupFilter, Shape, load_model, save_model, select_groups
from hawada.adapters.graph import GraphAdapter
from hawada.config import build
from hawada.core.distill import Outputs, OutputsFunction
from hawada.core.gates import SigmoidGate
from hawada.core.latency import LatencyTable, Proxy
from hawada.core.structure import ExportPolicy, Group, Inputs, Keep, KeptWhole, Rounding, Site
from hawada.core.task import Task
from hawada.workspace.dataset import Data, load_data
from hawada.workspace.device import configured_device
from hawada.workspace.store import Store

NEW_TOKENS = 32  # that a language model generates before it is saved and after it is loaded again


class Subject:
    """What a stage prunes, trains or measures, made from the configuration when it is first asked for.

    Args:
        cfg: the part of the configuration that the stage reads.
        store: where earlier stages saved models, and where this one saves its own.
    """

    def __init__(self, cfg: DictConfig, store: Store) -> None:
        self.cfg, self.store = cfg, store

    @cached_property
    def adapter(self) -> Adapter:
        """The model family."""
        adapter: Adapter = build(self.cfg.model.adapter)
        return adapter

    @property
    def adapter_spec(self) -> dict[str, Any]:
        """What a saved model's manifest needs to rebuild the architecture: no weights, no local path."""
        node = OmegaConf.to_container(self.cfg.model.adapter, resolve=True)
        assert isinstance(node, dict)
        return {str(key): value for key, value in node.items() if key not in ("weights", "path")}

    @property
    def trust(self) -> list[str]:
        """The code that this configuration itself names: what it saved may import it."""
        spec = self.adapter_spec
        return [spec["_target_"], *(spec[key] for key in self.adapter.imports if isinstance(spec.get(key), str))]

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
    def kept_whole(self) -> list[KeptWhole]:
        """The layers that keep units, with the reasons."""
        return list(self.adapter.kept_whole(self.meta))

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
    def policies(self) -> list[ExportPolicy]:
        """Sets of allowed widths, the finest first: one for each place in the lists of `gpu.multiple`."""
        listed = {kind: sorted(_as_list(values)) for kind, values in self.cfg.gpu.multiple.items()}
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
    def device(self) -> torch.device:
        """Where the models train."""
        return configured_device(self.cfg.gpu)

    @cached_property
    def accelerator(self) -> Accelerator:
        """Placement and mixed precision of training."""
        AcceleratorState._reset_state(True)  # it is global, and an earlier stage or job may have chosen otherwise
        return Accelerator(cpu=self.device.type == "cpu", mixed_precision=self.cfg.compute.mixed_precision)

    @cached_property
    def data(self) -> Data:
        """The data set.

        Raises:
            ValueError: when its images, text or labels are not what the model takes.
        """
        self._check_classification()
        classes = lambda: self.classes(self.adapter, self.meta)  # noqa: E731
        return load_data(self.cfg.data, self.adapter, classes, model=self.cfg.model.name, device=self.device)

    @cached_property
    def task(self) -> Task:
        """What the outputs mean."""
        task: Task = build(self.cfg.task)
        return task

    @property
    def outputs(self) -> OutputsFunction:
        """Runs a model for distillation."""
        return self._picked if self._task_picks() else self.adapter.outputs

    def pick(self, output: Any) -> torch.Tensor:
        """The tensor that is distilled and scored, within what a model returns."""
        return self.task.pick(output) if self._task_picks() else self.adapter.logits(output)

    def check_features(self, *, features: bool, hidden: bool) -> None:
        """Check that `outputs` has the features or hidden states that distillation uses.

        Raises:
            ValueError: It has none; the message names the keys to change.
        """
        if self._task_picks() and (features or hidden):
            name = type(self.task).__name__
            raise ValueError(
                f"distill: features and hidden states are not compared for {name}; set distill.chunk=null and "
                "distill.hidden_weight=0"
            )
        self.adapter.check_outputs(features=features, hidden=hidden)

    def _task_picks(self) -> bool:
        return type(self.task).pick is not Task.pick

    def _picked(self, model: nn.Module, inputs: torch.Tensor, *, features: bool, hidden: bool) -> Outputs:
        self.check_features(features=features, hidden=hidden)
        return Outputs(self.task.pick(self.adapter.raw(model)(inputs)))

    def _check_classification(self) -> None:
        """Refuse the task of classification for images whose model returns something else than logits of classes.

        Raises:
            ValueError: naming the task to choose.
        """
        if type(self.task) is not Task or self.adapter.modality != "image":
            return
        example = tuple(tensor.to("meta") for tensor in self.adapter.example_inputs(Shape(2)))
        with torch.no_grad():
            output = self.adapter.raw(self.meta)(*example)
        own = type(self.adapter).logits is not GraphAdapter.logits  # it picks the logits itself
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        shape = tuple(self.adapter.logits(output).shape)
        if (len(tensors) > 1 and not own) or len(shape) != 2 or shape[1] < 2:
            listed = ", ".join(str(tuple(tensor.shape[1:])) for tensor in tensors)
            raise ValueError(
                f"task: {self.cfg.model.name} returns {listed} for a sample, and classification takes one vector of "
                "two or more logits; set task=outputs, or task=segmentation for a class for each pixel"
            )

    def classes(self, adapter: Adapter, meta: nn.Module) -> int:
        """How many classes, or tokens, a model tells apart when it is shown what ours is; found on shapes alone."""
        example = self.adapter.example_inputs(Shape(1, prompt=8))
        pick = self.task.pick if self._task_picks() else adapter.logits
        with torch.no_grad():
            return pick(adapter.raw(meta)(*(x.to("meta") for x in example))).shape[-1]

    def teacher(self) -> nn.Module:
        """A fresh copy of the pretrained model, in eval mode on the CPU."""
        if self.cfg.model.pretrain:
            return self.saved_model("pretrain", "teacher")
        return self.adapter.teacher()

    def saved_model(self, stage: str, name: str) -> nn.Module:
        """A model that a stage saved."""
        return load_model(self.store.folder(stage) / name, self.trust)

    def new_gate(self, units: int) -> SigmoidGate:
        """A gate as configured."""
        gate: SigmoidGate = build(self.cfg.gate, shape=units)
        return gate

    def new_proxy(self, table: LatencyTable) -> Proxy:
        """The latency proxy as configured, without samples."""
        proxy: Proxy = build(self.cfg.proxy, table=table)
        return proxy

    def slim(self, model: nn.Module, keep: Keep) -> nn.Module:
        """A smaller copy of a model with only the kept units."""
        return self.adapter.slim(model, self.groups, keep)

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
        self.store.record(written)

    def check_inputs(self) -> Inputs:
        """A few inputs of a plain forward pass, in float32 on the CPU, for comparing models."""
        return self.adapter.example_inputs(Shape(4, "forward", 32))

    def check_outputs(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """A model's outputs on `check_inputs`: logits, and for a language model the tokens that it generates."""
        inputs = self.check_inputs()
        with torch.no_grad():
            logits = self.adapter.logits(self.adapter.raw(model)(*inputs)).contiguous()
            tokens = self.adapter.greedy_tokens(model, inputs, NEW_TOKENS)
        return {"logits": logits} if tokens is None else {"logits": logits, "tokens": tokens.contiguous()}


def _as_list(values: Any) -> list[int]:
    return list(values) if OmegaConf.is_list(values) else [values]
