"""Which layers least squares can reconstruct, and how a model's BatchNorms run meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hawada.core.finetune import NORMS

MAX_LAYER_INPUTS = 16384  # inputs of a layer times elements of its kernel: a matrix with so many rows is solved


def is_linear(module: nn.Module) -> bool:
    """Whether a module is linear in its whole input, with weights of its own of shape (outputs, inputs, …).

    These are plain linear layers and ungrouped convolutions with at most `MAX_LAYER_INPUTS` inputs.
    """
    plain = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in (nn.Linear, nn.Conv2d))
    weight = module._parameters.get("weight")  # a weight that a parametrization computes is not among the parameters
    return plain and weight is not None and getattr(module, "groups", 1) == 1 and weight[0].numel() <= MAX_LAYER_INPUTS


def is_centred(model: nn.Module, module: nn.Module) -> bool:
    """Whether a shift of a layer's outputs is taken up elsewhere: by its bias, or by the BatchNorm behind it."""
    norms = any(isinstance(other, NORMS) for other in model.modules())
    return module.bias is not None or (isinstance(module, nn.Conv2d) and norms)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Within the block, BatchNorms use the statistics of each batch and do not record them."""
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.track_running_stats]
    training = [norm.training for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
        norm.train()
    try:
        yield
    finally:
        for norm, was_training in zip(norms, training, strict=True):
            norm.track_running_stats = True
            norm.train(was_training)
