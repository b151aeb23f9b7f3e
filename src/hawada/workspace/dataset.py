"""The data set as configured, checked against the model that takes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pkgutil import resolve_name

import torch
from omegaconf import DictConfig

from hawada.adapters import Adapter, Shape
from hawada.config import build
from hawada.core.structure import Inputs, TensorRow
from hawada.data import OwnData, TextData, VisionData, own_data

Data = VisionData | TextData | OwnData


def load_data(
    node: DictConfig, adapter: Adapter, classes: Callable[[], int], *, model: str, device: torch.device
) -> Data:
    """Load a data set and check that a model can take it.

    Args:
        node: the configuration of the data.
        adapter: the model's family.
        classes: how many classes, or tokens, the model tells apart.
        model: the name of the model, for messages.
        device: where images are kept, if it is not the CPU.

    Raises:
        ValueError: when its images, text or labels are not what the model takes.
    """
    target = node["_target_"]
    takes_tokenizer = "tokenizer" in inspect.signature(resolve_name(target)).parameters
    if takes_tokenizer != (adapter.modality == "text"):
        raise ValueError(
            f"data: {target} is not {adapter.modality} data, which {model} takes; "
            "choose among stdlib, wikitext, slimpajama, text (text) and digits, cifar10, imagenet (image)"
        )
    return _load_text(node, adapter, classes) if takes_tokenizer else _load_images(node, adapter, classes, device)


def _load_text(node: DictConfig, adapter: Adapter, classes: Callable[[], int]) -> TextData:
    data: TextData = build(node, tokenizer=adapter.tokenizer())
    known = classes()
    if data.vocabulary > known:
        raise ValueError(
            f"data: the tokenizer has {data.vocabulary} tokens and the model knows {known}; "
            "use the tokenizer that belongs to the checkpoint"
        )
    return data


def _load_images(
    node: DictConfig, adapter: Adapter, classes: Callable[[], int], device: torch.device
) -> VisionData | OwnData:
    example = adapter.example_inputs(Shape(1))
    mean, std = adapter.normalisation() or (None, None)
    size = example[0].shape[2:]
    side = size[0] if len(set(size)) == 1 else list(size)
    known_of_model = {"mean": mean, "std": std, "image_size": side, "channels": example[0].shape[1]}
    takes = inspect.signature(resolve_name(node["_target_"])).parameters
    handed = {name: value for name, value in known_of_model.items() if name in takes and node.get(name) is None}
    data = build(node, **{name: value for name, value in handed.items() if value is not None})
    if not hasattr(data, "calibration_loader"):
        data = own_data(data, names=adapter.input_names(), count=len(example))
    images = next(iter(data.calibration_loader(1, 1)))[0]
    if isinstance(images, TensorRow):
        return _check_row(data, images, example)
    if images.shape[1:] != example[0].shape[1:]:
        raise ValueError(
            f"data: images of shape {tuple(images.shape[1:])} do not fit a model whose latency is optimised for "
            f"{tuple(example[0].shape[1:])}; set data.image_size and the model's image size to the same"
        )
    known = classes()
    if data.classes is not None and data.classes > known:
        raise ValueError(
            f"data: {data.classes} classes do not fit a model with {known}; "
            f"set the model's number of classes to {data.classes}"
        )
    return data.resident(device) if isinstance(data, VisionData) and device.type != "cpu" else data


def _check_row(data: OwnData, row: TensorRow, example: Inputs) -> OwnData:
    """Refuse data of other shapes than those whose latency is optimised."""
    for index, (given, expected) in enumerate(zip(row.tensors, example, strict=True)):
        if given.shape[1:] != expected.shape[1:]:
            raise ValueError(
                f"data: tensor {index} of a sample has shape {tuple(given.shape[1:])} and model.adapter.example "
                f"{tuple(expected.shape[1:])}; set the example to what the data hold"
            )
    return data
