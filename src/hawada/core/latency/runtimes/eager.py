"""The eager runtime: PyTorch launches one kernel after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def eager_call(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Return a function that calls the model itself in inference mode."""

    @torch.inference_mode()
    def call() -> Any:
        return model(*inputs)

    return call
