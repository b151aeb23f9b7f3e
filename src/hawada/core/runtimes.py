"""How a model is run while it is timed: eager, as a CUDA graph, or compiled."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

RUNTIMES = ("eager", "cudagraph", "compile")
WARM_UP_CALLS = 3  # before a capture, so that libraries have chosen their algorithms and made their workspaces


def prepare_call(model: nn.Module, inputs: tuple[Tensor, ...], runtime: str) -> Callable[[], Any]:
    """A function without arguments that runs the model once, in inference mode, on inputs of its own.

    Never for a model with gates: a graph would replay the gates that it was captured with.

    Args:
        model: in eval mode, on the inputs' device.
        inputs: are copied, so that no two prepared models share a buffer.
        runtime: one of `RUNTIMES`.

    Raises:
        ValueError: when the model or its device cannot be run so, naming runtime=eager.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime: {runtime!r} is not one of {', '.join(RUNTIMES)}; set runtime to one of them")
    static = tuple(x.detach().clone() for x in inputs)
    if runtime == "cudagraph":
        return _captured(model, static)
    if runtime == "compile":
        return _compiled(model, static)

    @torch.inference_mode()
    def call() -> Any:
        return model(*static)

    return call


def _captured(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Replays one captured forward pass on the stream that is current then."""
    device = inputs[0].device
    if device.type != "cuda":
        raise ValueError(
            f"runtime: CUDA graphs need an NVIDIA GPU and this model is on {device.type}; use runtime=eager"
        )
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                model(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        # A graph reads fixed addresses. What the model holds besides weights and buffers (the token that a decode step
        # goes on from) may be replaced during the capture, and its memory would then be given to something else.
        held = _held_tensors(model)
        try:
            with torch.cuda.graph(graph):
                output = model(*inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _unsuited(model, "captured as a CUDA graph", error) from error
    kept = (model, inputs, held, output)

    def call() -> Any:
        graph.replay()
        return kept[-1]

    return call


def _compiled(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Compiles the model as one graph of fixed shapes and calls it once, which is when it is compiled."""

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
        raise _unsuited(model, "compiled as one graph", error) from error
    return call


def _held_tensors(model: nn.Module) -> list[Tensor]:
    """Tensors that modules hold as plain attributes."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]


def _unsuited(model: nn.Module, done: str, error: Exception) -> ValueError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return ValueError(f"runtime: {type(model).__name__} cannot be {done} ({said}); use runtime=eager")
