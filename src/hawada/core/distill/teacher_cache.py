"""The teacher's logits for samples that come again in every epoch, each computed once."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch
from torch import Tensor

FREE_BYTES_PER_CACHED_BYTE = 8  # the logits may take an eighth of the memory that is free when the first batch comes


class TeacherCache:
    """The logits of one frozen teacher for the samples of a data set whose inputs are the same in every epoch.

    Args:
        count: the number of samples in the data set.
        limit_bytes: the most memory that the logits of all samples may take; if they need more, none is kept and the
            teacher runs on every batch. None allows an eighth of the memory that is free on the logits' device.
    """

    def __init__(self, count: int, limit_bytes: int | None = None) -> None:
        self.count, self.limit_bytes = count, limit_bytes
        self._logits: Tensor | None = None
        self._is_cached: Tensor | None = None

    @torch.no_grad()
    def logits(self, inputs: Tensor, numbers: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The teacher's logits for a batch, (batch, …); only samples that are not cached yet are computed.

        Args:
            inputs: the batch, (batch, …).
            numbers: the samples' indices in the data set, (batch,), on the inputs' device.
            compute: runs the teacher: inputs -> logits, with one row for each sample.
        """
        if self._logits is None or self._is_cached is None:
            logits = compute(inputs)
            limit = (
                _free_bytes(logits.device) // FREE_BYTES_PER_CACHED_BYTE
                if self.limit_bytes is None
                else self.limit_bytes
            )
            if logits[0].nbytes * self.count > limit:
                self.limit_bytes = 0  # the decision holds for all later batches, whatever memory is free then
                return logits
            self._logits = logits.new_empty((self.count, *logits.shape[1:]))
            self._is_cached = torch.zeros(self.count, dtype=torch.bool, device=logits.device)
            self._store(numbers, logits)
            return logits
        missing = ~self._is_cached[numbers]
        if bool(missing.any()):
            self._store(numbers[missing], compute(inputs[missing]))
        return self._logits[numbers]

    def _store(self, numbers: Tensor, logits: Tensor) -> None:
        assert self._logits is not None and self._is_cached is not None
        self._logits[numbers] = logits
        self._is_cached[numbers] = True


def _free_bytes(device: torch.device) -> int:
    """The free bytes of a GPU's memory, or of the machine's for any other device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
