"""The cudagraph runtime: one captured forward pass is replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hawada.core.latency.runtimes.unsuited import unsuited

WARM_UP_CALLS = 3  # before a capture, so that libraries have chosen their algorithms and allocated their workspaces


def capture_call(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Capture one forward pass; the returned function replays it on the stream that is current then.

    Raises:
        ValueError: when the model is not on an NVIDIA GPU, or cannot be captured.
    """
    device = inputs[0].device
    if device.type != "cuda":
        raise ValueError(
            f"runtime: CUDA graphs need an NVIDIA GPU and this model is on {device.type}; use runtime=eager"
        )
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.device(device):
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch does not annotate it
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                model(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        # A graph uses fixed addresses. Tensors that the model holds besides weights and buffers (the token that a
        # decode step continues from) may be replaced during the capture; what is kept here is not overwritten then.
        held = _held_tensors(model)
        try:
            with torch.cuda.graph(graph):
                output = model(*inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise unsuited(model, "captured as a CUDA graph", error) from error
    kept = (model, inputs, held, output)

    def call() -> Any:
        graph.replay()
        return kept[-1]

    return call


def _held_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors that modules hold as plain attributes."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
