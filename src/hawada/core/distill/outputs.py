"""What a model returns for a batch, and the function that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Outputs:
    """A model's logits for a batch, or the features from which its head makes logits a few tokens at a time.

    Attributes:
        logits: (batch, classes) or (batch, tokens, classes); None when features and head are given.
        features: the head's inputs, (batch, tokens, width).
        head: the last layer, which makes logits of features.
        hidden: the hidden states before the first layer and after each one, every one (batch, tokens, width); empty
            unless the caller asked for them.
    """

    logits: Tensor | None
    features: Tensor | None = None
    head: Callable[[Tensor], Tensor] | None = None
    hidden: tuple[Tensor, ...] = ()


class OutputsFunction(Protocol):
    """Runs a model on the inputs of a batch.

    With `features` it returns features and the head instead of logits; with `hidden` it returns the hidden states too.
    """

    def __call__(self, model: nn.Module, inputs: Tensor, *, features: bool, hidden: bool) -> Outputs: ...


def plain_outputs(model: nn.Module, inputs: Tensor, *, features: bool = False, hidden: bool = False) -> Outputs:
    """The `OutputsFunction` of models that return logits and nothing else; `features` and `hidden` have no effect."""
    return Outputs(model(inputs))


@dataclass(frozen=True)
class OtherTeacher:
    """A frozen model of another architecture, from whose logits the student learns instead of the unpruned model's.

    Attributes:
        model: the model in eval mode, on the student's device; it takes the same inputs and has the same classes.
        outputs: runs the model; usually its adapter's `outputs`.
    """

    model: nn.Module
    outputs: OutputsFunction = plain_outputs


@dataclass(frozen=True)
class Alignment:
    """Which of the teacher's hidden states and units the student still has.

    Attributes:
        states: for each hidden state of the student, the index of the teacher's hidden state that it corresponds to.
        units: the indices of the hidden stream's units that the student kept; None means all of them.
    """

    states: tuple[int, ...]
    units: tuple[int, ...] | None = None
