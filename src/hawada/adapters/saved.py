"""The file format of saved models: a folder with weights and a manifest that tells how to rebuild the shape."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hawada.adapters.base import Adapter
from hawada.core.structure import Group, plan_edits

MANIFEST = "hawada.json"

FORMAT = 2  # of the manifest

TRUSTED = ("hawada.",)
# Adapter classes by the names that earlier versions wrote into manifests.
RENAMED = {
    "hawada.adapters.convnet.adapter.ConvNetAdapter": "hawada.adapters.graph.GraphAdapter",
    "hawada.adapters.torchvision.resnet.ResNetAdapter": "hawada.adapters.torchvision.ResNetAdapter",
    "hawada.adapters.huggingface.llama.LlamaAdapter": "hawada.adapters.huggingface.LlamaAdapter",
    "hawada.adapters.huggingface.vit.ViTAdapter": "hawada.adapters.huggingface.ViTAdapter",
}


def save_model(
    path: Path,
    model: nn.Module,
    *,
    adapter: Adapter,
    adapter_spec: Mapping[str, Any],
    teacher: nn.Module,
    groups: Sequence[Group],
    keep: Mapping[str, Sequence[int]],
) -> None:
    """Write a teacher or slim model beside a manifest that tells how to rebuild its shape.

    The manifest carries the SHA-256 of the weights and is written last, so a folder without it is not a model.

    Args:
        path: folder; made if missing.
        model: what `adapter.slim(teacher, groups, keep)` returned, possibly finetuned.
        adapter: of the model's family.
        adapter_spec: its `_target_` and constructor arguments.
        teacher: the unpruned architecture (its numbers do not matter).
        groups: its declaration.
        keep: kept indices.
    """
    path.mkdir(parents=True, exist_ok=True)
    structure = adapter.write(path, model, plan_edits(teacher, groups, keep))
    manifest = {
        "format": FORMAT,
        "adapter": dict(adapter_spec),
        **structure,
        "keep": {name: list(kept) for name, kept in keep.items()},
        "sha256": {file.name: _sha256(file) for file in sorted(path.glob("*.safetensors"))},
    }
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(path: Path, trust: Sequence[str] = ()) -> nn.Module:
    """Read what `save_model` wrote, in eval mode on the CPU; see `load_with_adapter`."""
    return load_with_adapter(path, trust)[1]


def load_with_adapter(path: Path, trust: Sequence[str] = ()) -> tuple[Adapter, nn.Module]:
    """Read what `save_model` wrote, and the adapter that describes it. Nothing is unpickled.

    Args:
        path: the folder.
        trust: further package prefixes (`"mypackage."`) whose adapter class may be imported and called, and so may a
            function that builds the model (see `Adapter.imports`): nothing of this package is one.

    Raises:
        ValueError: when the folder is not a saved model, is damaged, or names code that is not trusted.
    """
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} holds no {MANIFEST}: not a saved model, or its writing was interrupted")
    given = (trust,) if isinstance(trust, str) else tuple(trust)
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest.get("format") != FORMAT or not manifest["sha256"]:
        raise ValueError(
            f"{path / MANIFEST} is not of format {FORMAT}: another version wrote it; export the model again"
        )
    for name, digest in manifest["sha256"].items():
        if not (path / name).is_file():
            raise ValueError(f"{path} holds no {name}: its writing was interrupted; copy or export it again")
        if _sha256(path / name) != digest:
            raise ValueError(f"{path / name} does not match the checksum in {MANIFEST}: copy or export it again")
    spec = dict(manifest["adapter"])
    target = str(spec.pop("_target_"))
    target = RENAMED.get(target, target)
    _check_trust(path, target, (*TRUSTED, *given))
    module, _, name = target.rpartition(".")
    adapter_class = getattr(importlib.import_module(module), name)
    if not (isinstance(adapter_class, type) and issubclass(adapter_class, Adapter)):
        raise ValueError(f"{path} wants to call {target}, which is not an adapter; do not use this file")
    for argument in adapter_class.imports:
        if spec.get(argument) is not None:
            _check_trust(path, str(spec[argument]), given)
    adapter = adapter_class(**spec)
    return adapter, adapter.read(path, manifest)


def _check_trust(path: Path, target: str, trusted: tuple[str, ...]) -> None:
    if not target.startswith(trusted):
        package = target.partition(".")[0]
        raise ValueError(f"{path} wants to run {target}; if you trust it, pass trust=['{package}.']")
