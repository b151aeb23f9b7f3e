"""The order in which the weights of convolutions lie in memory while they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def channels_last(models: Sequence[nn.Module], enabled: bool = True) -> Iterator[None]:
    """Within the block convolutions keep channels innermost in memory; after it their weights lie as before.

    Most convolutions are faster in this order and some are a little slower. Results differ by rounding.

    Args:
        models: the models, which are changed in place; their parameters stay the same objects.
        enabled: False leaves the models as they are.
    """
    chosen = models if enabled else ()
    try:
        for model in chosen:
            model.to(memory_format=torch.channels_last)
        yield
    finally:
        for model in chosen:
            model.to(memory_format=torch.contiguous_format)
