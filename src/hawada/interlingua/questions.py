"""A task of questions on real texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hawada.interlingua.examples import Example

MIN_TRAIN_CONTEXTS = 4  # with fewer, no training and validation contexts can be told apart
MAX_VALIDATION_CONTEXTS = 64


class Questions:
    """Batch examples by context: the questions on one context are asked in the same step.

    A fifth of the training contexts, but no more than `MAX_VALIDATION_CONTEXTS`, is kept for validation instead. Test
    contexts are in a fixed random order, so that the first ones come from many texts.

    Args:
        train: the examples to train on.
        test: the examples to test on.
        seed: the seed of the order of contexts, which changes with every epoch, and of the choice of questions.
        questions: the most questions on one context in a step.

    Raises:
        ValueError: when there are fewer than `MIN_TRAIN_CONTEXTS` contexts to train on.
    """

    def __init__(self, train: Sequence[Example], test: Sequence[Example], *, seed: int = 0, questions: int = 4) -> None:
        groups = _by_context(train)
        if len(groups) < MIN_TRAIN_CONTEXTS:
            raise ValueError(
                f"data: questions on {len(groups)} contexts are too few to train on; set data.path or "
                "interlingua.samples to more"
            )
        kept = max(2, min(MAX_VALIDATION_CONTEXTS, len(groups) // 5))
        order = np.random.default_rng(0).permutation(len(groups))
        self.groups = [groups[index] for index in sorted(order[kept:])]
        self.validated = [groups[index] for index in sorted(order[:kept])]
        tests = _by_context(test)
        self.tests = [tests[index] for index in np.random.default_rng(0).permutation(len(tests))]
        self.lengths = np.sort([len(group[0].context) for group in self.groups])
        self.seed, self.questions = seed, questions

    def steps_per_epoch(self, contexts: int) -> int:
        """Return the number of steps in which every context comes once."""
        return -(-len(self.groups) // contexts)

    def train_batch(self, step: int, contexts: int, share: float = 1.0) -> list[Example]:
        """Return a batch, see `Task.train_batch`; a share below 1 leaves out the longest contexts."""
        epoch, place = divmod(step, self.steps_per_epoch(contexts))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))
        chosen = [self.groups[index] for index in order[place * contexts : (place + 1) * contexts]]
        if share < 1:
            longest = self.lengths[max(0, round(share * len(self.lengths)) - 1)]
            short = [group for group in chosen if len(group[0].context) <= longest]
            chosen = short or [min(chosen, key=lambda group: len(group[0].context))]
        generator = np.random.default_rng([self.seed, 1, step])
        return [
            group[index]
            for group in chosen
            for index in sorted(generator.permutation(len(group))[: self.questions].tolist())
        ]

    def validation(self, contexts: int) -> list[Example]:
        """Return validation examples, see `Task.validation`; at most `questions` on each context."""
        return [example for group in self.validated[:contexts] for example in group[: self.questions]]

    def test(self, contexts: int) -> list[Example]:
        """Return test examples, see `Task.test`; at most `questions` on each context."""
        return [example for group in self.tests[:contexts] for example in group[: self.questions]]


def _by_context(examples: Sequence[Example]) -> list[list[Example]]:
    """Group examples by their context, in the order in which contexts first come."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.context, []).append(example)
    return list(groups.values())
