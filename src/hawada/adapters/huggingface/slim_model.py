"""Slim transformers models: built from a configuration that the sliced tensors ask for, read without foreign code."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hawada.adapters.huggingface import slim_layers
from hawada.adapters.huggingface.pretrained import quietly
from hawada.core.structure import Edits, without_elements

_SLIM_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {}


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, tied ones under each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def sliced_tensors(model: nn.Module, edits: Edits, layers: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of the slim model, by their names in it: layers that stay are counted anew.

    Args:
        model: not changed.
        edits: what goes.
        layers: paths of the model's layers, in order.
    """
    tensors = all_tensors(model)
    removed: dict[int, dict[int, Tensor]] = {}  # by identity: tied tensors are cut once
    for name, cuts in edits.removed.items():
        removed.setdefault(id(tensors[name]), {}).update(cuts)
    kept = [path for path in layers if path not in edits.replaced]
    numbered = {path: f"{path.rpartition('.')[0]}.{index}" for index, path in enumerate(kept)}
    sliced: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if any(name.startswith(f"{gone}.") for gone in edits.replaced):
            continue
        if id(tensor) not in sliced:
            sliced[id(tensor)] = without_elements(tensor.detach().clone(), removed.get(id(tensor), {}))
        path = next((path for path in kept if name.startswith(f"{path}.")), None)
        state[name if path is None else numbered[path] + name[len(path) :]] = sliced[id(tensor)]
    return state


def build_empty(config: PreTrainedConfig, auto: str) -> PreTrainedModel:
    """An untrained model in float32 and eval mode, on torch's current default device."""
    if hasattr(type(config), "slim_model"):
        slim: Any = type(config)
        return slim.slim_model(config).float().eval()
    return getattr(transformers, auto).from_config(config, dtype=torch.float32).eval()


def build_filled(
    config: PreTrainedConfig, auto: str, state: Mapping[str, Tensor], original: nn.Module
) -> PreTrainedModel:
    """The model of a configuration with these tensors, on the original's device, in eval mode.

    Raises:
        RuntimeError: when the configuration describes a tensor of another shape, or one that is not there.
    """
    with torch.device("meta"):
        model = build_empty(config, auto)
    empty = all_tensors(model)
    for name in sorted(set(state) - set(empty)):
        raise RuntimeError(f"the slim configuration has no place for {name}: the adapter's widths are wrong")
    for name, tensor in empty.items():
        if name not in state or tensor.shape != state[name].shape:
            raise RuntimeError(f"the slim configuration does not describe {name}: the adapter's widths are wrong")
        owner, _, attribute = name.rpartition(".")
        holder = model.get_submodule(owner)
        if attribute in holder._parameters:
            holder._parameters[attribute] = nn.Parameter(state[name])
        else:
            holder._buffers[attribute] = state[name]
    model.tie_weights()
    generation = getattr(original, "generation_config", None)
    if generation is not None:
        model.generation_config = copy.deepcopy(generation)
    return model.eval()


def stock_class(config: PreTrainedConfig) -> type[PreTrainedConfig]:
    """The configuration class of transformers itself that a configuration is or extends."""
    return getattr(type(config), "stock_config", type(config))


def slim_classes(
    config_class: type[PreTrainedConfig], auto: str
) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Configuration and model of a family with layers of different widths: what the shipped file defines too."""
    key = f"slim_{config_class.model_type}"
    if key not in _SLIM_CLASSES:
        model_class = getattr(transformers, auto)._model_mapping[config_class]
        config = type(f"Slim{config_class.__name__}", (slim_layers.SlimConfig, config_class), {"model_type": key})
        model = type(f"Slim{model_class.__name__}", (slim_layers.SlimLayers, model_class), {"config_class": config})
        config.slim_model, config.stock_config = model, config_class  # type: ignore[attr-defined]
        model.stock_model = model_class  # type: ignore[attr-defined]
        _SLIM_CLASSES[key] = (config, model)
    return _SLIM_CLASSES[key]


def read_config(folder: Path) -> PreTrainedConfig:
    """A folder's configuration; that of a heterogeneous slim model without running the code beside it.

    Raises:
        ValueError: when it cannot be read, or contradicts itself.
    """
    try:
        record = json.loads((folder / "config.json").read_text())
        if "slim" not in record:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        stock = type(AutoConfig.for_model(record["model_type"].removeprefix("slim_")))
        return slim_classes(stock, record["slim"]["auto"])[0].from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{folder} has no usable config.json ({reason}); copy or export it again") from None


def save_folder(path: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Save as transformers does, in a dtype, with the modelling file where one is needed."""
    plain: Any = copy.deepcopy(model).to(device="cpu", dtype=dtype)  # type: ignore[call-arg]
    plain.config.dtype = dtype
    with quietly():
        plain.save_pretrained(path)
    if not hasattr(type(model.config), "slim_model"):
        return
    config, stock = stock_class(model.config), type(model).stock_model.__name__  # type: ignore[attr-defined]
    footer = f"""

from transformers import {config.__name__}, {stock}  # noqa: E402


class Slim{config.__name__}(SlimConfig, {config.__name__}):
    model_type = "slim_{config.model_type}"


class Slim{stock}(SlimLayers, {stock}):
    config_class = Slim{config.__name__}
"""
    (path / "modeling_slim.py").write_text(inspect.getsource(slim_layers).rstrip() + footer)
    record = json.loads((path / "config.json").read_text())
    names = {"AutoConfig": config.__name__, record["slim"]["auto"]: stock}
    record["auto_map"] = {auto: f"modeling_slim.Slim{name}" for auto, name in names.items()}
    (path / "config.json").write_text(json.dumps(record, indent=2) + "\n")
