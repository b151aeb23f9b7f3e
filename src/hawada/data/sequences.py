"""Sequences of one length that are cut from a long row of tokens, and the order in which they are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from hawada.core.task import IGNORED

Batch = tuple[Tensor, Tensor]


class PackedTokens(Dataset[Batch]):
    """Windows of one long row of tokens; whole batches are fetched at once.

    Window i predicts tokens i T + 1 … (i + 1) T, so every token but the first is predicted exactly once.

    Args:
        tokens: the ids of all tokens, (N,).
        sequence_length: T, the number of tokens that a window predicts.
        pad: the id that fills the last window, whose missing labels are -100; None drops a last window that is not
            full.
    """

    def __init__(self, tokens: NDArray[np.int32], sequence_length: int, *, pad: int | None = None) -> None:
        self.size, self.sequence_length = len(tokens), sequence_length
        predicted = max(self.size - 1, 0)
        self.count = predicted // sequence_length if pad is None else -(-predicted // sequence_length)
        missing = max(0, self.count * sequence_length + 1 - self.size)
        self.tokens = np.pad(tokens, (0, missing), constant_values=pad or 0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        inputs, labels = self.__getitems__([index])
        return inputs[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        # NumPy is used because starting PyTorch's threads costs more than so little work, above all on a busy machine.
        start = np.asarray(indices, np.int64)[:, None] * self.sequence_length
        place = start + np.arange(self.sequence_length + 1)  # (B, T + 1)
        window = self.tokens[place].astype(np.int64)
        labels = np.where(place < self.size, window, IGNORED)[:, 1:]
        return torch.from_numpy(window[:, :-1].copy()), torch.from_numpy(labels.copy())


class EpochBatches(Sampler[list[int]]):
    """Shuffled batches of indices, epoch after epoch; an epoch's order depends on (seed, epoch) alone.

    Iterating yields the rest of the current epoch, or the next epoch when the last one was used up. `position` counts
    the batches that were yielded so far, over all epochs.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, start: int) -> None:
        self.size, self.batch_size, self.seed, self.position = size, batch_size, seed, start

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.position // len(self)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
        while self.position < (epoch + 1) * len(self):
            first = (self.position - epoch * len(self)) * self.batch_size
            self.position += 1
            yield order[first : first + self.batch_size].tolist()
