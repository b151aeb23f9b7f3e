"""A model's size, parameters and multiply-accumulates, and the outputs of two models compared."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from hawada.core.structure import Inputs


def count_parameters(model: nn.Module) -> int:
    """The number of a model's parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """The multiply-accumulates of one forward pass on these inputs, which is half of torch's FLOP count.

    They are counted from shapes alone, on the meta device; nothing is computed.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        copy.deepcopy(model).to("meta")(*(x.to("meta") for x in inputs))
    return int(counter.get_total_flops() // 2)


def compare_outputs(first: Any, second: Any) -> dict[str, float]:
    """The largest absolute difference between two outputs, and the largest absolute value of the first.

    Args:
        first: a tensor, or tuples, lists and dictionaries of tensors.
        second: the same with tensors of the same shapes.

    Returns:
        `max_abs_diff`, and `max_abs_logit`, which gives it a scale; of several tensors, those of the one that differs
        most on its scale.
    """
    pairs = zip(_tensors(first), _tensors(second), strict=True)
    found = [
        {
            "max_abs_diff": float((one.double() - other.double()).abs().max()),
            "max_abs_logit": float(one.double().abs().max()),
        }
        for one, other in pairs
        if one.numel()
    ]
    return max(found, key=_relative)


def _relative(pair: dict[str, float]) -> float:
    """The difference on its scale; what is not a number differs most."""
    ratio = pair["max_abs_diff"] / max(pair["max_abs_logit"], 1e-9)
    return math.inf if math.isnan(ratio) else ratio


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
