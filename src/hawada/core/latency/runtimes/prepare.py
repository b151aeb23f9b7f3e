"""The choice of the runtime that a model is timed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hawada.core.latency.runtimes.compile import compile_call
from hawada.core.latency.runtimes.cudagraph import capture_call
from hawada.core.latency.runtimes.eager import eager_call

_PREPARE = {"eager": eager_call, "cudagraph": capture_call, "compile": compile_call}
RUNTIMES = tuple(_PREPARE)


def prepare_call(model: nn.Module, inputs: tuple[Tensor, ...], runtime: str) -> Callable[[], Any]:
    """Return a function without arguments that runs the model once, in inference mode, on inputs of its own.

    The model must have no gates, because a graph would replay the gates that it was captured with.

    Args:
        model: a model in eval mode, on the inputs' device.
        inputs: the tensors to call it with; they are copied, so that no two prepared models share a buffer.
        runtime: one of `RUNTIMES`.

    Raises:
        ValueError: when the model or its device cannot be run so; the message names runtime=eager as the remedy.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime: {runtime!r} is not one of {', '.join(RUNTIMES)}; set runtime to one of them")
    static = tuple(x.detach().clone() for x in inputs)
    return _PREPARE[runtime](model, static)
