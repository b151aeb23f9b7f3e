"""Forward passes that pause at some of a model's layers, so that many batches reach a layer before any passes it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn


class PassStopped(Exception):
    """Raised inside a forward pass to leave out the rest of it."""


class StepwisePass(threading.Thread):
    """A forward pass without gradients that runs from one of certain modules to the next, and waits there.

    It is a thread, because nothing else can pause inside a model's `forward`; but it runs only while `advance_to` or
    `close` waits for it. Of the caller's context it takes over the inputs' device alone, not autocast and not a CUDA
    stream. Several passes may go through a model at once if the modules store nothing about a pass. Use it within
    `pausing_at`, and `close` it.

    Args:
        model: the model, in the mode in which it is to run.
        inputs: the model's only argument.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        super().__init__(daemon=True)
        self._model, self._inputs = model, inputs
        self._may_run, self._has_paused = threading.Semaphore(0), threading.Semaphore(0)
        self._module: nn.Module | None = None
        self._tensor: Tensor | None = None
        self._error: BaseException | None = None
        self._is_closed = self._is_over = False

    def advance_to(self, module: nn.Module) -> Tensor:
        """Run up to the next pause, which must be at this module; returns its input or output, see `pausing_at`.

        Raises:
            RuntimeError: when the pass reaches another module, or its end. What the model raises is passed on.
        """
        if self.ident is None:
            self.start()
        if not self._is_over:
            self._may_run.release()
            self._has_paused.acquire()
        error, self._error = self._error, None
        if error is not None:
            raise error
        if self._is_over or self._tensor is None or self._module is not module:
            reached = "its end" if self._is_over else "another layer"
            raise RuntimeError(
                f"export.reconstruct: the forward pass reached {reached} before the layer that was expected next, so "
                "this model does not call its layers in the same order for every batch; set export.reconstruct=false"
            )
        return self._tensor

    def close(self) -> None:
        """End the pass where it is and leave out the rest of it."""
        self._is_closed = True
        if self.ident is not None:
            self._may_run.release()
            self.join()

    def run(self) -> None:
        """Run the forward pass; this is the body of the thread."""
        self._may_run.acquire()
        try:
            device = self._inputs.device
            on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            with suppress(PassStopped), torch.no_grad(), on_device:  # `pause` raises it when the pass is closed
                self._model(self._inputs)
        except BaseException as error:
            self._error = error  # `advance_to` raises it in the caller's thread
        self._tensor, self._is_over = None, True
        self._has_paused.release()

    def pause(self, module: nn.Module, tensor: Tensor) -> None:
        """Hand over a module's tensor and wait for the next `advance_to`; called inside the thread."""
        self._module, self._tensor = module, tensor
        self._has_paused.release()
        self._may_run.acquire()
        if self._is_closed:
            raise PassStopped


@contextmanager
def pausing_at(modules: Sequence[nn.Module], *, before: bool) -> Iterator[None]:
    """Within the block, every `StepwisePass` pauses at these modules; other passes do not.

    Args:
        modules: the modules, in any order.
        before: True pauses before a module runs and hands over its first argument; False pauses after it and hands over
            its output. Hooks that the modules already have, such as gates, run first.
    """

    def pause(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        thread = threading.current_thread()
        if isinstance(thread, StepwisePass):
            thread.pause(module, args[0] if before else output)

    register = "register_forward_pre_hook" if before else "register_forward_hook"
    handles = [getattr(module, register)(pause) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
