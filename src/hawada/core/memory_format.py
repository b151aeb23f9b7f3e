"""How the weights of convolutions lie in memory while they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def channels_last(models: Sequence[nn.Module], wanted: bool = True) -> Iterator[None]:
    """Within the block, if so wanted, convolutions compute with channels innermost; after it all is as it was.

    Some convolutions are faster that way and some a little slower; results differ by rounding.

    Args:
        models: changed in place; parameters stay the same objects.
        wanted: false leaves everything alone.
    """
    chosen = models if wanted else ()
    try:
        for model in chosen:
            model.to(memory_format=torch.channels_last)
        yield
    finally:
        for model in chosen:
            model.to(memory_format=torch.contiguous_format)
