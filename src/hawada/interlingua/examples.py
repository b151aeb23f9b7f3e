"""Examples, each a context with a question and its answers, and the tasks that examples come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Example(Protocol):
    """A question on a context. Models are trained on the first answer; any of the answers is right."""

    @property
    def context(self) -> str: ...

    @property
    def question(self) -> str: ...

    @property
    def answers(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class PlainExample:
    """An example that holds its three texts itself.

    Attributes:
        context: the text that the question is about.
        question: the question.
        answers: the right answers, the one to train on first; empty for a question that the context does not answer.
    """

    context: str
    question: str
    answers: tuple[str, ...]


class Task(Protocol):
    """A source of examples. A batch depends on the step alone, so a resumed run continues with the same batches."""

    def train_batch(self, step: int, contexts: int, share: float = 1.0) -> Sequence[Example]:
        """Return the examples of one training step, with the questions on one context behind each other.

        Args:
            step: the number of the step, counted from 0.
            contexts: the number of different contexts.
            share: the length of contexts as a fraction of their full length; a curriculum begins below 1.
        """

    def validation(self, contexts: int) -> Sequence[Example]:
        """Return questions on at most so many contexts; they measure a training in progress and come nowhere else."""

    def test(self, contexts: int) -> Sequence[Example]:
        """Return questions on so many contexts that are never trained on; they are always the same."""
