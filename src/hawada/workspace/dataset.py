"""The data set as configured, checked against the model that takes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pkgutil import resolve_name

import torch
from omegaconf import DictConfig

from hawada.adapters import Adapter, Shape
from hawada.config import build
from hawada.data import TextData, VisionData


def load_data(
    node: DictConfig, adapter: Adapter, classes: Callable[[], int], *, model: str, device: torch.device
) -> VisionData | TextData:
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


def _load_images(node: DictConfig, adapter: Adapter, classes: Callable[[], int], device: torch.device) -> VisionData:
    own = adapter.normalisation()
    takes = own is not None and {"mean", "std"} <= set(inspect.signature(resolve_name(node["_target_"])).parameters)
    data: VisionData = build(node, **(dict(zip(("mean", "std"), own, strict=True)) if own and takes else {}))
    images, _ = next(iter(data.calibration_loader(1, 1)))
    example = adapter.example_inputs(Shape(1))
    if images.shape[1:] != example[0].shape[1:]:
        raise ValueError(
            f"data: images of shape {tuple(images.shape[1:])} do not fit a model whose latency is optimised for "
            f"{tuple(example[0].shape[1:])}; set data.image_size and the model's image size to the same"
        )
    known = classes()
    if data.classes > known:
        raise ValueError(
            f"data: {data.classes} classes do not fit a model with {known}; "
            f"set the model's number of classes to {data.classes}"
        )
    return data.resident(device) if isinstance(data, VisionData) and device.type != "cpu" else data
