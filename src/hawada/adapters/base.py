"""What a model family must declare, and the file format of the models it saves."""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hawada.core.export import plan_edits, set_structure
from hawada.core.structure import Group, Site

MANIFEST = "hawada.json"
WEIGHTS = "model.safetensors"
TRUSTED = ("hawada.",)


class Adapter(ABC):
    """Declares one family of models.

    A subclass keeps its constructor's arguments plain (strings, numbers, lists): they are what a saved model's
    manifest holds, and `skeleton()` must rebuild the same architecture from them.
    """

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """The untrained architecture in eval mode, on torch's current default device (`meta` costs nothing)."""

    @abstractmethod
    def teacher(self) -> nn.Module:
        """The pretrained model in eval mode, on the CPU.

        Raises:
            ValueError: when the weights cannot be had, naming the local-path option.
        """

    def check_teacher(self) -> None:  # noqa: B027 (a family without files to check has nothing to override)
        """Check quickly that `teacher()` will find its weights; nothing is loaded.

        Raises:
            ValueError: naming the local-path option.
        """

    @abstractmethod
    def groups(self, model: nn.Module) -> list[Group]:
        """Everything that may be removed from `model`, a skeleton or teacher of this adapter."""

    @abstractmethod
    def sites(self, model: nn.Module) -> list[Site]:
        """The modules that the latency table times, in order of execution."""

    @abstractmethod
    def example_inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs of the shape whose latency is optimised, on the CPU, the same values every time."""

    def logits(self, output: Any) -> Tensor:
        """The logits, (batch, classes), within what the model returns."""
        return output


def save_model(
    path: Path,
    model: nn.Module,
    *,
    adapter_spec: Mapping[str, Any],
    teacher: nn.Module,
    groups: Sequence[Group],
    keep: Mapping[str, Sequence[int]],
) -> None:
    """Write a teacher or slim model as safetensors beside a manifest that tells how to rebuild its shape.

    The manifest carries the SHA-256 of the weights and is written last, so a folder without it is not a model.

    Args:
        path: folder; made if missing.
        model: what `materialize(teacher, groups, keep)` returned, possibly finetuned.
        adapter_spec: the adapter's `_target_` and constructor arguments.
        teacher: the unpruned architecture (its numbers do not matter).
        groups: its declaration.
        keep: kept indices.
    """
    edits = plan_edits(teacher, groups, keep)
    path.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path / WEIGHTS, metadata={"format": "pt"})
    manifest = {
        "format": 1,
        "adapter": dict(adapter_spec),
        "attributes": edits.attributes,
        "replaced": {name: list(keeps) for name, keeps in edits.replaced.items()},
        "keep": {name: list(kept) for name, kept in keep.items()},
        "sha256": hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest(),
    }
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def load_model(path: Path, trust: Sequence[str] = ()) -> nn.Module:
    """Read what `save_model` wrote, in eval mode on the CPU; see `load_with_adapter`."""
    return load_with_adapter(path, trust)[1]


def load_with_adapter(path: Path, trust: Sequence[str] = ()) -> tuple[Adapter, nn.Module]:
    """Read what `save_model` wrote, and the adapter that describes it. Nothing is unpickled.

    Args:
        path: the folder.
        trust: further package prefixes (`"mypackage."`) whose adapter class may be imported and called.

    Raises:
        ValueError: when the folder is not a saved model, is damaged, or names an adapter that is not trusted.
    """
    for name in (MANIFEST, WEIGHTS):
        if not (path / name).is_file():
            raise ValueError(f"{path} holds no {name}: not a saved model, or its writing was interrupted")
    trusted = (*TRUSTED, trust) if isinstance(trust, str) else (*TRUSTED, *trust)
    manifest = json.loads((path / MANIFEST).read_text())
    if hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest() != manifest["sha256"]:
        raise ValueError(f"{path / WEIGHTS} does not match the checksum in {MANIFEST}: copy or export it again")
    spec = dict(manifest["adapter"])
    target = spec.pop("_target_")
    if not target.startswith(trusted):
        package = target.partition(".")[0]
        raise ValueError(f"{path} wants to run {target}; if you trust it, pass trust=['{package}.']")
    module, _, name = target.rpartition(".")
    adapter_class = getattr(importlib.import_module(module), name)
    if not (isinstance(adapter_class, type) and issubclass(adapter_class, Adapter)):
        raise ValueError(f"{path} wants to call {target}, which is not an adapter; do not use this file")
    adapter = adapter_class(**spec)
    with torch.device("meta"):
        model = adapter.skeleton()
    model = set_structure(model, manifest["attributes"], manifest["replaced"])
    _fill(model, load_file(path / WEIGHTS), path)
    return adapter, model.eval()


def _fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Give every tensor of a meta model its saved value, whatever its shape; names must agree exactly."""
    expected = set(model.state_dict())
    if expected != set(state):
        odd = sorted(expected ^ set(state))[0]
        raise ValueError(f"{path / WEIGHTS} does not fit its manifest: {odd} is on one side only; export it again")
    for name, tensor in state.items():
        owner_path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_path)
        if attribute in owner._parameters:
            setattr(owner, attribute, nn.Parameter(tensor))
        else:
            setattr(owner, attribute, tensor)
