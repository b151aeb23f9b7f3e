"""Models as people have them: what wraps a model is taken off, what cannot be sliced is refused."""

from __future__ import annotations

import torch
from torch import nn

KNOWN_HOOKS = ("SpectralNorm",)  # which computes the weight anew from tensors that are cut


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model within `DataParallel`, `DistributedDataParallel` and `torch.compile`.

    Raises:
        ValueError: The model is of a kind that has no parameters to slice; the message names the one that has.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model.adapter.factory: it returns a TorchScript program; return the module that it was made of"
        )
    for path, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic")):
            raise ValueError(
                f"{path or type(model).__name__}: it is quantised already; return the model in floating point, and "
                "quantise the slim one"
            )
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        names = [getattr(hook, "__name__", type(hook).__name__) for hook in hooks]
        if "WeightNorm" in names:
            raise ValueError(
                f"{path}: torch.nn.utils.weight_norm keeps a tensor that cannot be copied; use "
                "torch.nn.utils.parametrizations.weight_norm, which loads the same checkpoints"
            )
        unknown = [name for name in names if name not in KNOWN_HOOKS]
        if unknown:
            raise ValueError(
                f"{path or type(model).__name__}: nobody knows what its forward hook {unknown[0]} does to fewer "
                "channels; remove the hook, or do its work in forward"
            )
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner: nn.Module | None = model.module
    else:
        inner = getattr(model, "_orig_mod", None)  # of torch.compile's OptimizedModule
    return inner if isinstance(inner, nn.Module) else None
