"""What a model is called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]  # positional, batch first


class TensorRow:
    """The tensors of a batch for a model that takes several, which is handed from place to place as one is.

    A model that takes a row has a hook that makes the arguments of its forward pass of it.

    Args:
        tensors: The tensors, each with the samples along its first axis.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, chosen: Any) -> TensorRow:
        """Return some of the samples."""
        return TensorRow([tensor[chosen] for tensor in self.tensors])

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """The shape of every tensor."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return self.tensors[0].device

    def is_floating_point(self) -> bool:
        """Return True: `to` leaves whole numbers as they are."""
        return True

    def to(self, target: Any) -> TensorRow:
        """Move to a device, or to the device and dtype of a tensor; whole numbers keep their dtype."""
        if not isinstance(target, Tensor):
            return TensorRow([tensor.to(target) for tensor in self.tensors])
        return TensorRow(
            [tensor.to(target if tensor.is_floating_point() else target.device) for tensor in self.tensors]
        )
