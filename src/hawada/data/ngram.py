"""A byte n-gram model: the baseline that a language model trained on the same text has to beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_ORDER = 8  # bytes in a 64-bit key


def witten_bell_perplexity(train: bytes, test: bytes, order: int = 5) -> float:
    """Compute the perplexity per byte of an interpolated Witten-Bell model (Witten & Bell, 1991).

    The model has the form of Chen & Goodman (1998): with c counts in `train`, h the bytes before w, h' the same without
    its oldest byte and N(h) the number of different bytes that follow h,

        p(w | h) = (c(h w) + N(h) p(w | h')) / (c(h) + N(h)),

    where a context that `train` does not have takes p(w | h') over, and single bytes are interpolated with 1 / 256. The
    first bytes of `test` have only the context that precedes them.

    Args:
        train: the text whose n-grams are counted.
        test: the text that is predicted.
        order: the length of the longest n-gram in bytes, context included.

    Raises:
        ValueError: when there is nothing to predict, or when the order is out of range.
    """
    if not test:
        raise ValueError("the test text is empty; give at least one byte to predict")
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order: {order} is not from 1 to {MAX_ORDER}; choose one of these")
    probability = np.full(len(test), 1 / 256)
    for length in range(1, min(order, len(train), len(test)) + 1):
        grams, counts = np.unique(_keys(train, length), return_counts=True)
        contexts, first = np.unique(_context(grams), return_index=True)  # grams are sorted, and so by context
        kinds, totals = np.diff(first, append=len(grams)), np.add.reduceat(counts, first)
        keys = _keys(test, length)
        seen, followers, total = (
            _look_up(grams, counts, keys),
            _look_up(contexts, kinds, _context(keys)),
            _look_up(contexts, totals, _context(keys)),
        )
        lower = probability[length - 1 :]
        known = total > 0
        lower[known] = ((seen + followers * lower) / np.maximum(total + followers, 1))[known]
    return float(np.exp(-np.log(probability).mean()))


def _keys(text: bytes, length: int) -> NDArray[np.uint64]:
    """Encode every window of `length` bytes as one number, the oldest byte highest."""
    data = np.frombuffer(text, np.uint8).astype(np.uint64)
    count = len(data) - length + 1
    keys = np.zeros(count, np.uint64)
    for offset in range(length):
        keys = (keys << np.uint64(8)) | data[offset : offset + count]
    return keys


def _context(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Drop the last byte of every window."""
    return keys >> np.uint64(8)


def _look_up(table: NDArray[np.uint64], values: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Look keys up in a sorted table; the value is 0 where it has no such key."""
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[place] == keys, values[place], 0)
