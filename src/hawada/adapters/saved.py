"""Loads saved models: a folder with weights and a manifest that tells how to rebuild the shape, see `save_model`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from hawada.adapters.base import MANIFEST, MANIFEST_FORMAT, Adapter
from hawada.core.files import sha256

TRUSTED_PREFIXES = ("hawada.",)  # of adapter classes that are imported without being asked for
# Earlier versions wrote these names of adapter classes into manifests; each is loaded under its name of today.
RENAMED_ADAPTERS = {
    "hawada.adapters.convnet.adapter.ConvNetAdapter": "hawada.adapters.graph.GraphAdapter",
    "hawada.adapters.torchvision.resnet.ResNetAdapter": "hawada.adapters.torchvision.ResNetAdapter",
    "hawada.adapters.huggingface.llama.LlamaAdapter": "hawada.adapters.huggingface.LlamaAdapter",
    "hawada.adapters.huggingface.vit.ViTAdapter": "hawada.adapters.huggingface.ViTAdapter",
}


def load_model(path: Path, trust: Sequence[str] = ()) -> nn.Module:
    """Read what `save_model` wrote, in eval mode on the CPU; see `load_with_adapter`."""
    return load_with_adapter(path, trust)[1]


def load_with_adapter(path: Path, trust: Sequence[str] = ()) -> tuple[Adapter, nn.Module]:
    """Read what `save_model` wrote, and the adapter that describes it. Nothing is unpickled.

    Args:
        path: The folder.
        trust: Further package prefixes (`"mypackage."`). An adapter class of these packages may be imported and called,
            and so may a function of theirs that builds the model (see `Adapter.imports`); such a function is never
            taken from this package.

    Raises:
        ValueError: The folder is not a saved model, is damaged, or names code that is not trusted.
    """
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} holds no {MANIFEST}: not a saved model, or its writing was interrupted")
    given = (trust,) if isinstance(trust, str) else tuple(trust)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST} cannot be read ({error}); copy or export the model again") from None
    if manifest.get("format") != MANIFEST_FORMAT or not manifest.get("sha256"):
        raise ValueError(
            f"{path / MANIFEST} is not of format {MANIFEST_FORMAT}: another version wrote it; export the model again"
        )
    for name, digest in manifest["sha256"].items():
        if not (path / name).is_file():
            raise ValueError(f"{path} holds no {name}: its writing was interrupted; copy or export it again")
        if sha256(path / name) != digest:
            raise ValueError(f"{path / name} does not match the checksum in {MANIFEST}: copy or export it again")
    spec = dict(manifest["adapter"])
    target = str(spec.pop("_target_"))
    target = RENAMED_ADAPTERS.get(target, target)
    _check_trust(path, target, (*TRUSTED_PREFIXES, *given))
    module, _, name = target.rpartition(".")
    try:
        adapter_class = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path} needs {target}, which cannot be imported ({error}); install its package") from None
    if not (isinstance(adapter_class, type) and issubclass(adapter_class, Adapter)):
        raise ValueError(f"{path} wants to call {target}, which is not an adapter; do not use this file")
    for argument in adapter_class.imports:
        if isinstance(spec.get(argument), str):
            _check_trust(path, str(spec[argument]), given)
    adapter = adapter_class(**spec)
    return adapter, adapter.read(path, manifest)


def _check_trust(path: Path, target: str, trusted: tuple[str, ...]) -> None:
    """Refuse code whose full name begins with none of the trusted prefixes."""
    if not target.startswith(trusted):
        package = target.partition(".")[0]
        raise ValueError(f"{path} wants to run {target}; if you trust it, pass trust=['{package}.']")
