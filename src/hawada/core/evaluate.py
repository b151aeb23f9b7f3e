"""What a model is worth and what it costs: accuracy, agreement, parameters, multiply-accumulates, equality of two."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hawada.core.profiler import Inputs


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass on these inputs (half of torch's FLOP count); runs on shapes only."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        copy.deepcopy(model).to("meta")(*(x.to("meta") for x in inputs))
    return int(counter.get_total_flops() // 2)


@torch.no_grad()
def predict_classes(model: nn.Module, batches: Iterable[Any], logits: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """(predicted, labels), both (samples,) on the CPU, over batches of (inputs, labels), in the model's dtype."""
    weight = next(model.parameters())
    predicted, labels = [], []
    for inputs, wanted in batches:
        predicted.append(logits(model(inputs.to(weight))).argmax(-1).cpu())
        labels.append(wanted)
    return torch.cat(predicted), torch.cat(labels)


def compare_outputs(first: Tensor, second: Tensor) -> dict[str, float]:
    """`max_abs_diff` between two outputs and `max_abs_logit` of the first, which gives it a scale."""
    return {
        "max_abs_diff": float((first.float() - second.float()).abs().max()),
        "max_abs_logit": float(first.float().abs().max()),
    }
