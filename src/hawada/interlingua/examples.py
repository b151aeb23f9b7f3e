"""What is asked: a context, a question, its answers; and where a task's examples come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Example(Protocol):
    """A question on a context. The first answer is what is trained on; any of them is right."""

    @property
    def context(self) -> str: ...

    @property
    def question(self) -> str: ...

    @property
    def answers(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Asked:
    """An example made here."""

    context: str
    question: str
    answers: tuple[str, ...]


class Task(Protocol):
    """A source of examples. A batch depends on the step alone, so that a resumed run sees what it would have seen."""

    def train_batch(self, step: int, contexts: int, share: float = 1.0) -> Sequence[Example]:
        """The examples of one training step, questions on the same context behind each other.

        Args:
            step: from 0.
            contexts: how many different ones.
            share: of the full length of contexts; a curriculum begins below 1.
        """

    def validation(self, contexts: int) -> Sequence[Example]:
        """Questions on at most so many contexts by which a training is judged while it goes on: no others show them."""

    def test(self, contexts: int) -> Sequence[Example]:
        """Questions on so many contexts that training never shows; always the same."""
