"""A model called as plain PyTorch calls it, one kernel launch after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def eager_call(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Calls the model itself in inference mode."""

    @torch.inference_mode()
    def call() -> Any:
        return model(*inputs)

    return call
