"""A model's quality and size: accuracy and perplexity, parameters and multiply-accumulates, and outputs compared."""

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


@dataclass(frozen=True)
class Scores:
    """A model's quality on labelled data.

    Attributes:
        predicted: the most likely class at every position that counts, (positions,), on the CPU.
        accuracy: the fraction of them that agree with the label, in [0, 1].
        nll: the mean negative log-likelihood of the labels, in nats.
    """

    predicted: Tensor
    accuracy: float
    nll: float

    @property
    def perplexity(self) -> float:
        """exp(nll); for a language model this is the perplexity per token."""
        return math.exp(min(self.nll, 700.0))


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Any], logits_of: Callable[[Any], Tensor]) -> Scores:
    """Run a model, in its own dtype, on labelled data.

    Args:
        model: the model, in eval mode.
        batches: (inputs, labels), with labels of shape (batch,) or (batch, tokens); `IGNORED` labels do not count.
        logits_of: what the model returns -> its logits, (batch, classes) or (batch, tokens, classes).

    Raises:
        ValueError: when no label counts.
    """
    weight = next(model.parameters())
    predicted, correct, loss, count = [], 0, 0.0, 0
    for inputs, labels in batches:
        logits = logits_of(model(inputs.to(weight if inputs.is_floating_point() else weight.device)))
        labels = labels.to(logits.device)
        logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]  # (positions, classes), (positions,)
        best = logits.argmax(-1)
        loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
        correct += int((best == labels).sum())
        count += len(labels)
        predicted.append(best.cpu())
    if not count:
        raise ValueError("the test data is empty; check data.root, data.path and data.test_samples")
    return Scores(torch.cat(predicted), correct / count, loss / count)


def compare_outputs(first: Tensor, second: Tensor) -> dict[str, float]:
    """The largest absolute difference between two outputs of one shape, and the largest absolute value of the first.

    Returns:
        `max_abs_diff`, and `max_abs_logit`, which gives it a scale.
    """
    return {
        "max_abs_diff": float((first.float() - second.float()).abs().max()),
        "max_abs_logit": float(first.float().abs().max()),
    }
