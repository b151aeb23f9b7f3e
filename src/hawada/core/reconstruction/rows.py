"""A layer's inputs and outputs as rows: input row times weights is output row, for linear layers and convolutions."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ROWS_PER_IMAGE = 128  # more positions of one image would add little: neighbours hardly differ


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's input, or some of its channels, as rows that its weights multiply: (rows, inputs), in float32.

    A linear layer has a row for every position. A convolution has one for each of at most `MAX_ROWS_PER_IMAGE`
    positions of an image, which are chosen once and then always the same.

    Args:
        module: a linear layer or an ungrouped convolution.
        x: its input, (…, features) or (images, channels, height, width).
    """
    if not isinstance(module, nn.Conv2d):
        return x.flatten(0, -2).float()
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, _padding(module), mode=mode)
    (kernel_height, kernel_width), (down, right) = module.kernel_size, module.dilation
    patches = padded.unfold(2, down * (kernel_height - 1) + 1, module.stride[0])
    patches = patches.unfold(3, right * (kernel_width - 1) + 1, module.stride[1])[..., ::down, ::right]
    # `patches` is a view, (images, channels, height, width, *kernel), and only the chosen patches are copied.
    height, width = patches.shape[2:4]
    chosen = _chosen_positions(len(x), height * width).to(x.device)  # (images, positions)
    image = torch.arange(len(x), device=x.device)[:, None]
    return patches[image, :, chosen // width, chosen % width].flatten(2).flatten(0, 1).float()


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """The rows of a layer's output that belong to those of `input_rows`: (rows, outputs), in float32.

    Args:
        module: a linear layer or an ungrouped convolution.
        y: its output, (…, features) or (images, channels, height, width).
    """
    if not isinstance(module, nn.Conv2d):
        return y.flatten(0, -2).float()
    flat = y.flatten(2)  # (images, outputs, positions)
    chosen = _chosen_positions(*flat.shape[::2]).to(y.device)
    return flat.gather(2, chosen[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2).flatten(0, 1).float()


def _padding(module: nn.Conv2d) -> list[int]:
    """A convolution's padding in the order of `F.pad`: left, right, top, bottom."""
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [side for size in reversed(total) for side in (size // 2, size - size // 2)]
    sizes = (0, 0) if module.padding == "valid" else tuple(int(size) for size in module.padding)
    return [sizes[1], sizes[1], sizes[0], sizes[0]]


@lru_cache(maxsize=64)
def _chosen_positions(images: int, positions: int) -> Tensor:
    """The positions of each image that get a row, the same at every call: (images, at most MAX_ROWS_PER_IMAGE)."""
    if positions <= MAX_ROWS_PER_IMAGE:
        return torch.arange(positions).expand(images, -1)
    order = torch.rand(images, positions, generator=torch.Generator().manual_seed(0)).argsort(1)
    return order[:, :MAX_ROWS_PER_IMAGE].clone()
