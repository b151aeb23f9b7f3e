"""The file format of saved models: a folder with weights and a manifest that tells how to rebuild the shape."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hawada.adapters.base import Adapter
from hawada.core.files import partial_path, sha256
from hawada.core.structure import Group, plan_edits

MANIFEST = "hawada.json"

MANIFEST_FORMAT = 2  # a manifest with another number is refused

TRUSTED_PREFIXES = ("hawada.",)  # of adapter classes that are imported without being asked for
# Earlier versions wrote these names of adapter classes into manifests; each is loaded under its name of today.
RENAMED_ADAPTERS = {
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
) -> list[Path]:
    """Write a teacher or slim model beside a manifest that tells how to rebuild its shape.

    The manifest carries the SHA-256 of the weights and is written last, so a folder without it is not a model. A model
    that was saved there before is replaced; other files stay as they are.

    Args:
        path: The folder, which is made if it is missing.
        model: The result of `adapter.slim(teacher, groups, keep)`, possibly finetuned.
        adapter: The adapter of the model's family.
        adapter_spec: The adapter's `_target_` and constructor arguments.
        teacher: The unpruned architecture; the values of its weights do not matter.
        groups: The groups that the adapter declares of the teacher.
        keep: The kept indices by group name.

    Returns:
        The files that were written.

    Raises:
        ValueError: One of these files would replace a file that does not belong to a saved model.
    """
    path.mkdir(parents=True, exist_ok=True)
    scratch = partial_path(path / "model")  # inside, because what is beside may be another file system
    scratch.mkdir()
    try:
        structure = adapter.write(scratch, model, plan_edits(teacher, groups, keep))
        names = sorted(file.relative_to(scratch) for file in scratch.rglob("*") if file.is_file())
        before = _saved_before(path, [*names, Path(MANIFEST)])
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch / name, path / name)
    finally:
        shutil.rmtree(scratch)
    for gone in before - {str(name) for name in names}:
        (path / gone).unlink(missing_ok=True)  # weights of the earlier model, which would be taken for this one's
    manifest = {
        "format": MANIFEST_FORMAT,
        "adapter": dict(adapter_spec),
        **structure,
        "keep": {name: list(kept) for name, kept in keep.items()},
        "sha256": {str(name): sha256(path / name) for name in names if name.match("*.safetensors")},
    }
    whole = partial_path(path / MANIFEST)
    whole.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(whole, path / MANIFEST)
    return [*(path / name for name in names), path / MANIFEST]


def _saved_before(path: Path, names: Sequence[Path]) -> set[str]:
    """List the weights of the model that was saved in a folder before, by the names in its manifest.

    Raises:
        ValueError: One of `names` exists although no model was saved there, or is a link.
    """
    try:
        record = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        record = None
    saved = isinstance(record, dict) and isinstance(record.get("sha256"), dict) and "adapter" in record
    for name in names:
        if os.path.lexists(path / name) and ((path / name).is_symlink() or not saved):
            raise ValueError(
                f"{path / name} was there before and is no saved model's, so it is not replaced; "
                "move it away, or save to another folder"
            )
    if record is None or not saved:
        return set()
    known = {name: path / name for name in record["sha256"] if Path(name).name == name}
    return {name for name, file in known.items() if file.is_file() and not file.is_symlink()}


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
