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
from hawada.core.structure import Edits, all_tensors, fill, sliced_tensors

_SLIM_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {}


def slim_name(name: str, edits: Edits, layers: Sequence[str]) -> str | None:
    """What a module or tensor is called in the slim model, where the layers that stay are counted anew.

    Args:
        name: in the unpruned model.
        edits: what goes.
        layers: paths of the unpruned model's layers, in order.

    Returns:
        None where it goes.
    """
    if edits.removes(name):
        return None
    for index, path in enumerate(path for path in layers if not edits.removes(path)):
        if f"{name}.".startswith(f"{path}."):
            return f"{path.rpartition('.')[0]}.{index}{name[len(path) :]}"
    return name


def slim_state(model: nn.Module, edits: Edits, layers: Sequence[str], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of the slim model by their names in it, or those of what its module at `prefix` becomes.

    Args:
        model: the unpruned model; not changed.
        edits: what goes.
        layers: paths of the model's layers, in order.
        prefix: path of a module of `model`.
    """
    sliced = sliced_tensors(model, edits, prefix)
    return {slim: sliced[name] for name in sliced if (slim := slim_name(name, edits, layers)) is not None}


def slim_shapes(model: nn.Module, edits: Edits, layers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of `slim_state`; nothing is cut."""
    named = {name: (slim_name(name, edits, layers), tensor) for name, tensor in all_tensors(model).items()}
    return {slim: edits.shape(name, tensor) for name, (slim, tensor) in named.items() if slim is not None}


def build_empty(config: PreTrainedConfig, auto: str) -> PreTrainedModel:
    """An untrained model in float32 and eval mode, on torch's current default device."""
    if hasattr(type(config), "slim_model"):
        slim: Any = type(config)
        model: PreTrainedModel = slim.slim_model(config).float().eval()
    else:
        model = getattr(transformers, auto).from_config(config, dtype=torch.float32).eval()
    return model


def build_filled(
    config: PreTrainedConfig, auto: str, state: Mapping[str, Tensor], original: nn.Module
) -> PreTrainedModel:
    """The model of a configuration with these tensors, on the original's device, in eval mode.

    Raises:
        RuntimeError: when the configuration describes a tensor of another shape, or one that is not there.
    """
    with torch.device("meta"):
        model = build_empty(config, auto)
    _fill_described(model, state)
    model.tie_weights()
    generation = getattr(original, "generation_config", None)
    if generation is not None:
        model.generation_config = copy.deepcopy(generation)
    return model


def build_module(config: PreTrainedConfig, auto: str, state: Mapping[str, Tensor], path: str) -> nn.Module:
    """The module at a path of the model of a configuration; only its own tensors are filled, from the model's `state`.

    Raises:
        RuntimeError: as `build_filled`.
    """
    with torch.device("meta"):
        module = build_empty(config, auto).get_submodule(path)
    _fill_described(module, {name.removeprefix(f"{path}."): tensor for name, tensor in state.items()})
    return module


def _fill_described(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a module that a configuration describes, and check that it has these tensors in these shapes."""
    empty = all_tensors(module)
    for name in sorted(set(state) - set(empty)):
        raise RuntimeError(f"the slim configuration has no place for {name}: the adapter's widths are wrong")
    for name, tensor in empty.items():
        if name not in state or tensor.shape != state[name].shape:
            raise RuntimeError(f"the slim configuration does not describe {name}: the adapter's widths are wrong")
    fill(module, state)


def stock_class(config: PreTrainedConfig) -> type[PreTrainedConfig]:
    """The configuration class of transformers itself that a configuration is or extends."""
    stock: type[PreTrainedConfig] = getattr(type(config), "stock_config", type(config))
    return stock


def slim_classes(
    config_class: type[PreTrainedConfig], auto: str
) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Configuration and model of a family with layers of different widths: what the shipped file defines too."""
    key = f"slim_{config_class.model_type}"
    if key not in _SLIM_CLASSES:
        model_class = getattr(transformers, auto)._model_mapping[config_class]
        config = type(f"Slim{config_class.__name__}", (slim_layers.SlimConfig, config_class), {"model_type": key})
        model = type(f"Slim{model_class.__name__}", (slim_layers.SlimLayers, model_class), {"config_class": config})
        config.slim_model, config.stock_config = model, config_class  # type: ignore[attr-defined]  # added here
        model.stock_model = model_class  # type: ignore[attr-defined]  # added here
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
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            return config
        stock = type(AutoConfig.for_model(record["model_type"].removeprefix("slim_")))
        return slim_classes(stock, record["slim"]["auto"])[0].from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{folder} has no usable config.json ({reason}); copy or export it again") from None


def save_folder(path: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Save as transformers does, in a dtype, with the modelling file where one is needed."""
    plain: Any = copy.deepcopy(model).to(device="cpu", dtype=dtype)  # type: ignore[call-arg]  # its decorator hides the signature
    plain.config.dtype = dtype
    with quietly():
        plain.save_pretrained(path)
    if not hasattr(type(model.config), "slim_model"):
        return
    config, stock = stock_class(model.config), type(model).stock_model.__name__  # type: ignore[attr-defined]  # see slim_classes
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
