"""Answers to samples that come again and again, each asked for once."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch
from torch import Tensor

SHARE = 8  # one part in so many of the free memory may be answers


class AnswerCache:
    """What a frozen model says about the samples of a data set whose inputs are the same in every epoch.

    Args:
        count: samples in the data set.
        limit_bytes: where all answers together would take more, none is kept and each is asked for every time; None
            means an eighth of the memory that is free on the device where the answers come from.
    """

    def __init__(self, count: int, limit_bytes: int | None = None) -> None:
        self.count, self.limit_bytes = count, limit_bytes
        self._answers: Tensor | None = None
        self._known: Tensor | None = None

    @torch.no_grad()
    def take(self, inputs: Tensor, numbers: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """The answers to a batch, (batch, …); the model is asked for those alone that are not known.

        Args:
            inputs: (batch, …).
            numbers: of the samples in the data set, (batch,), on the inputs' device.
            ask: inputs -> the model's answers, one a sample.
        """
        if self._answers is None or self._known is None:
            said = ask(inputs)
            limit = _free_bytes(said.device) // SHARE if self.limit_bytes is None else self.limit_bytes
            if said[0].nbytes * self.count > limit:
                self.limit_bytes = 0  # it was decided
                return said
            self._answers = said.new_empty((self.count, *said.shape[1:]))
            self._known = torch.zeros(self.count, dtype=torch.bool, device=said.device)
            self._put(numbers, said)
            return said
        new = ~self._known[numbers]
        if bool(new.any()):
            self._put(numbers[new], ask(inputs[new]))
        return self._answers[numbers]

    def _put(self, numbers: Tensor, said: Tensor) -> None:
        assert self._answers is not None and self._known is not None
        self._answers[numbers] = said
        self._known[numbers] = True


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
