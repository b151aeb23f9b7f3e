"""How the weights of convolutions lie in memory while they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def channels_last(models: Sequence[nn.Module | None], wanted: bool = True) -> Iterator[None]:
    """Within the block, if so wanted, convolutions compute with channels innermost; after it all is as it was.

    Tensor cores and narrow convolutions on CPUs gain from it, others lose a little; results differ by rounding.

    Args:
        models: changed in place; parameters stay the same objects. None is passed over.
        wanted: false leaves everything alone.
    """
    chosen = [model for model in models if model is not None and wanted]
    for model in chosen:
        model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for model in chosen:
            model.to(memory_format=torch.contiguous_format)
