"""What a model is worth and what it costs: accuracy, agreement, parameters, multiply-accumulates, equality of two."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hawada.core.distill import IGNORED
from hawada.core.structure import Inputs


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass on these inputs (half of torch's FLOP count); runs on shapes only."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        copy.deepcopy(model).to("meta")(*(x.to("meta") for x in inputs))
    return int(counter.get_total_flops() // 2)


@dataclass(frozen=True)
class Scores:
    """How a model did on labelled data.

    Attributes:
        predicted: the most likely class at every position that counts, (positions,), on the CPU.
        accuracy: fraction of them that agree with the label.
        nll: mean negative log-likelihood of the labels in nats.
    """

    predicted: Tensor
    accuracy: float
    nll: float

    @property
    def perplexity(self) -> float:
        """exp(nll): per token for a language model."""
        return math.exp(min(self.nll, 700.0))


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Any], logits: Callable[[Any], Tensor]) -> Scores:
    """Run a model, in its own dtype, over batches of (inputs, labels).

    Labels have shape (batch,), or (batch, tokens) where `IGNORED` ones do not count.
    """
    weight = next(model.parameters())
    predicted, correct, loss, count = [], 0, 0.0, 0
    for inputs, labels in batches:
        said = logits(model(inputs.to(weight if inputs.is_floating_point() else weight.device)))
        labels = labels.to(said.device)
        said, labels = said[labels != IGNORED], labels[labels != IGNORED]  # (positions, classes), (positions,)
        best = said.argmax(-1)
        loss += float(F.cross_entropy(said.float(), labels, reduction="sum"))
        correct += int((best == labels).sum())
        count += len(labels)
        predicted.append(best.cpu())
    if not count:
        raise ValueError("the test data is empty; check data.root, data.path and data.test_samples")
    return Scores(torch.cat(predicted), correct / count, loss / count)


def compare_outputs(first: Tensor, second: Tensor) -> dict[str, float]:
    """`max_abs_diff` between two outputs and `max_abs_logit` of the first, which gives it a scale."""
    return {
        "max_abs_diff": float((first.float() - second.float()).abs().max()),
        "max_abs_logit": float(first.float().abs().max()),
    }
