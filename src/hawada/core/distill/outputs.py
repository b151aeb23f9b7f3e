"""What a model returns for a batch, and how it is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

IGNORED = -100  # a label that does not count: padding, or the end of a text


@dataclass(frozen=True)
class Outputs:
    """What a model says about a batch: logits, or the features from which a head makes them a few tokens at a time.

    Attributes:
        logits: (batch, classes) or (batch, tokens, classes); None when features and head are given.
        features: what the head takes, (batch, tokens, width).
        head: features -> logits.
        hidden: states before the first layer and after each one, (batch, tokens, width); empty unless asked for.
    """

    logits: Tensor | None
    features: Tensor | None = None
    head: Callable[[Tensor], Tensor] | None = None
    hidden: tuple[Tensor, ...] = ()


class Reader(Protocol):
    """Runs a model on a batch's inputs."""

    def __call__(self, model: nn.Module, inputs: Tensor, *, features: bool, hidden: bool) -> Outputs: ...


def plain_reader(model: nn.Module, inputs: Tensor, *, features: bool = False, hidden: bool = False) -> Outputs:
    """For models that return logits and nothing else."""
    return Outputs(model(inputs))


@dataclass(frozen=True)
class OtherTeacher:
    """A frozen model of another architecture, whose answers the student is to give instead of the original's.

    Attributes:
        model: in eval mode, where the student trains; it takes the same inputs and knows the same classes.
        reader: runs it; its adapter's `outputs`.
    """

    model: nn.Module
    reader: Reader = plain_reader


@dataclass(frozen=True)
class Alignment:
    """Which of the teacher's hidden states and units the student still has.

    Attributes:
        states: for each of the student's hidden states, the index of the teacher's that it answers to.
        units: the teacher's units of the hidden stream that the student kept, or None for all.
    """

    states: tuple[int, ...]
    units: tuple[int, ...] | None = None
