"""Cutting tensors and single modules: each slicer returns something new and smaller and leaves the given one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Indices = Sequence[int] | Tensor | None
Module = TypeVar("Module", bound=nn.Module)


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer; one that has several names (a tied weight) under each of them."""
    buffers = module.named_buffers(remove_duplicate=False)
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(buffers)}


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers these values, whatever their shapes were; what was trainable stays so.

    Args:
        module: changed in place.
        tensors: by name in `module`; they are not copied.
    """
    made: dict[int, nn.Parameter] = {}  # a tensor that is given under several names stays one
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        parameter = owner._parameters.get(attribute)
        if parameter is None:
            owner._buffers[attribute] = tensor
        else:
            made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=parameter.requires_grad))
            owner._parameters[attribute] = made[id(tensor)]


def slice_tensor(tensor: Tensor, dim: int, index: Indices) -> Tensor:
    """The entries `index` along `dim`, as a contiguous copy without history; None keeps all.

    Where the channels of a tensor lie innermost in memory, they do so in the copy.

    Raises:
        ValueError: when the index is empty or points outside the axis.
    """
    tensor = tensor.detach()
    if index is None:
        return tensor.clone()
    positions = torch.as_tensor(index, dtype=torch.long)  # checked by value, so not on the meta device
    size = tensor.shape[dim]
    if positions.numel() == 0:
        raise ValueError(f"nothing would be left of an axis of {size}; keep at least one element")
    outside = positions[(positions < 0) | (positions >= size)]
    if len(outside):
        raise ValueError(f"index {int(outside[0])} is outside an axis of {size} elements")
    chosen = tensor.index_select(dim, positions.to(tensor.device))
    last = chosen.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    return chosen.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def slice_linear(linear: nn.Linear, *, out_features: Indices = None, in_features: Indices = None) -> nn.Linear:
    """A Linear with the given output rows and input columns."""
    weight = slice_tensor(slice_tensor(linear.weight, 0, out_features), 1, in_features)
    sliced = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    bias = None if linear.bias is None else slice_tensor(linear.bias, 0, out_features)
    return _filled(sliced, linear, weight, bias)


def slice_conv2d(conv: nn.Conv2d, *, out_channels: Indices = None, in_channels: Indices = None) -> nn.Conv2d:
    """A Conv2d with the given output and input channels.

    Raises:
        ValueError: for a grouped convolution, whose channels cannot be chosen freely.
    """
    if conv.groups != 1:
        raise ValueError(
            f"a convolution with groups={conv.groups} has no freely removable channels; groups=1 is expected"
        )
    weight = slice_tensor(slice_tensor(conv.weight, 0, out_channels), 1, in_channels)
    sliced = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        kernel_size=conv.kernel_size,  # type: ignore[arg-type]  # as many as the convolution has axes
        stride=conv.stride,  # type: ignore[arg-type]  # as many as the convolution has axes
        padding=conv.padding,  # type: ignore[arg-type]  # as many as the convolution has axes
        dilation=conv.dilation,  # type: ignore[arg-type]  # as many as the convolution has axes
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device="meta",
    )
    bias = None if conv.bias is None else slice_tensor(conv.bias, 0, out_channels)
    return _filled(sliced, conv, weight, bias)


def slice_embedding(
    embedding: nn.Embedding, *, embedding_dim: Indices = None, num_embeddings: Indices = None
) -> nn.Embedding:
    """An Embedding with the given columns (and rows); padding_idx follows its row.

    Raises:
        ValueError: when the padding row itself would be cut.
    """
    weight = slice_tensor(slice_tensor(embedding.weight, 0, num_embeddings), 1, embedding_dim)
    padding = embedding.padding_idx
    if padding is not None and num_embeddings is not None:
        rows = [int(row) for row in num_embeddings]
        if padding not in rows:
            raise ValueError(f"row {padding} is the padding row and cannot be cut; keep it in num_embeddings")
        padding = rows.index(padding)
    sliced = nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=padding, device="meta")
    return _filled(sliced, embedding, weight)


def _filled(sliced: Module, original: nn.Module, weight: Tensor, bias: Tensor | None = None) -> Module:
    """Fill a module that was made on the meta device; training mode and requires_grad follow the original."""
    fill(sliced, {"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    for name, parameter in sliced.named_parameters():
        parameter.requires_grad_(original.get_parameter(name).requires_grad)
    return sliced.train(original.training)
