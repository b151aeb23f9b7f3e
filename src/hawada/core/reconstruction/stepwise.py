"""Forward passes that stand still at some of a model's layers, so that many batches come to a layer together."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn


class Stopped(Exception):
    """The forward pass came as far as it was wanted."""


class Stepwise(threading.Thread):
    """A forward pass without gradients that goes from one of certain modules to the next, and waits there.

    A thread, since nothing else leaves a model's `forward` where it is; but it runs only while `step` or `close` waits
    for it. Of the caller's context it has the inputs' device alone: no autocast, no stream. Several passes may go
    through a model at once if that keeps nothing of a pass on its modules. Use it within `stops`, and `close` it.

    Args:
        model: in the mode in which it is to run.
        inputs: its only argument.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        super().__init__(daemon=True)
        self._model, self._inputs = model, inputs
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._at: nn.Module | None = None
        self._seen: Tensor | None = None
        self._error: BaseException | None = None
        self._closed = self._over = False

    def step(self, module: nn.Module) -> Tensor:
        """Run up to this module, the next; returns what it is given, or what it says, as `stops` was told.

        Raises:
            RuntimeError: when the pass comes to another one, or to its end. What the model raises is passed on.
        """
        if self.ident is None:
            self.start()
        if not self._over:
            self._go.release()
            self._stands.acquire()
        error, self._error = self._error, None
        if error is not None:
            raise error
        if self._over or self._seen is None or self._at is not module:
            came = "its end" if self._over else "another layer"
            raise RuntimeError(
                f"the model came to {came}: its layers do not always come in the same order, and so cannot be refitted "
                "one after the other; set export.reconstruct=false"
            )
        return self._seen

    def close(self) -> None:
        """Leave out what is left of the pass."""
        self._closed = True
        if self.ident is not None:
            self._go.release()
            self.join()

    def run(self) -> None:
        """What the thread does."""
        self._go.acquire()
        try:
            device = self._inputs.device
            here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            with suppress(Stopped), torch.no_grad(), here:  # whoever closes a pass wants no more of it
                self._model(self._inputs)
        except BaseException as error:
            self._error = error  # for whoever waits
        self._seen, self._over = None, True
        self._stands.release()

    def stand(self, module: nn.Module, seen: Tensor) -> None:
        """Within the thread: wait for the next `step`."""
        self._at, self._seen = module, seen
        self._stands.release()
        self._go.acquire()
        if self._closed:
            raise Stopped


@contextmanager
def stops(modules: Sequence[nn.Module], *, before: bool) -> Iterator[None]:
    """Within the block, every `Stepwise` pass stands still at these modules; other passes do not.

    Args:
        modules: in any order.
        before: stand before they run and show their first argument, else behind them and show their output. Hooks that
            the modules have already, gates for instance, come first.
    """

    def stand(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        thread = threading.current_thread()
        if isinstance(thread, Stepwise):
            thread.stand(module, args[0] if before else output)

    register = "register_forward_pre_hook" if before else "register_forward_hook"
    handles = [getattr(module, register)(stand) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
