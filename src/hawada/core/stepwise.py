"""Forward passes that stand still at some of a model's layers, so that many batches come to a layer together."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Stopped(Exception):
    """The forward pass came as far as it was wanted."""


class Stepwise(threading.Thread):
    """A forward pass without gradients that goes from one of certain modules to the next, and waits there.

    A thread, since nothing else leaves a model's `forward` where it is; but it runs while `step` waits for it and at
    no other time. Use it within `stops`, and `close` it.

    Args:
        model: in the mode in which it is to run.
        inputs: its only argument.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        super().__init__(daemon=True)
        self._model, self._inputs = model, inputs
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._seen: Tensor | None = None
        self._error: BaseException | None = None
        self._closed = self._over = False

    def step(self) -> Tensor:
        """Run up to the next module; returns what it is given, or what it says, as `stops` was told.

        Raises:
            RuntimeError: when the pass ends instead. What the model itself raises is passed on.
        """
        if self.ident is None:
            self.start()
        if not self._over:
            self._go.release()
            self._stands.acquire()
        if self._error is not None:
            raise self._error
        if self._over or self._seen is None:
            raise RuntimeError("the forward pass came to its end and to no further module")
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
            with torch.no_grad():  # each thread has its own mode
                self._model(self._inputs)
        except Stopped:
            pass
        except BaseException as error:
            self._error = error  # for whoever waits
        self._over = True
        self._stands.release()

    def stand(self, seen: Tensor) -> None:
        """Within the thread: wait for the next `step`."""
        self._seen = seen
        self._stands.release()
        self._go.acquire()
        if self._closed:
            raise Stopped


@contextmanager
def stops(modules: Sequence[nn.Module], *, before: bool) -> Iterator[None]:
    """Within the block, every `Stepwise` pass stands still at these modules; other passes do not.

    Args:
        modules: in any order.
        before: stand before they run and show their first argument, else behind them and show their output.
    """

    def stand(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        thread = threading.current_thread()
        if isinstance(thread, Stepwise):
            thread.stand(args[0] if before else output)

    register = "register_forward_pre_hook" if before else "register_forward_hook"
    handles = [getattr(module, register)(stand) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
