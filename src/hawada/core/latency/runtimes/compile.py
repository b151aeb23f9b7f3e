"""The compile runtime: the model is compiled as one graph of fixed shapes."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hawada.core.latency.runtimes.unsuited import unsuited


def compile_call(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Compile the model as one graph of fixed shapes, and call it once, which is when torch compiles it.

    Raises:
        ValueError: when the model cannot be compiled so.
    """

    def forward(*given: Tensor) -> Any:
        return model(*given)

    # Compiled code is cached per code object and only for a few shapes, beyond which torch silently runs eagerly;
    # dozens of sliced models share the code of their forward, so each is compiled under a code object of its own.
    own = types.FunctionType(forward.__code__.replace(), globals(), "forward", None, forward.__closure__)
    compiled = torch.compile(own, dynamic=False, fullgraph=True)

    @torch.inference_mode()
    def call() -> Any:
        return compiled(*inputs)

    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # dynamo's and inductor's errors derive from it
        raise unsuited(model, "compiled as one graph", error) from error
    return call
