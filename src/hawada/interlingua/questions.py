"""Questions on real texts as a task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hawada.interlingua.examples import Example

FEWEST, MOST_VALIDATED = 4, 64  # contexts


class Questions:
    """Examples in batches of whole contexts: every question on a context is asked in the same step.

    A fifth of the contexts to train on, but no more than 64, is kept for validation instead. Tests are in a fixed
    random order, so that the first ones are of many texts.

    Args:
        train: to train on.
        test: to test on.
        seed: of the order, which is another in each epoch.
        questions: most on one context in a step.

    Raises:
        ValueError: when there are fewer than `FEWEST` contexts to train on.
    """

    def __init__(self, train: Sequence[Example], test: Sequence[Example], *, seed: int = 0, questions: int = 4) -> None:
        groups = _by_context(train)
        if len(groups) < FEWEST:
            raise ValueError(
                f"data: questions on {len(groups)} contexts are too few to train on; set data.path or "
                "interlingua.samples to more"
            )
        kept = max(2, min(MOST_VALIDATED, len(groups) // 5))
        order = np.random.default_rng(0).permutation(len(groups))
        self.groups = [groups[index] for index in sorted(order[kept:])]
        self.validated = [groups[index] for index in sorted(order[:kept])]
        tests = _by_context(test)
        self.tests = [tests[index] for index in np.random.default_rng(0).permutation(len(tests))]
        self.lengths = np.sort([len(group[0].context) for group in self.groups])
        self.seed, self.questions = seed, questions

    def steps_per_epoch(self, contexts: int) -> int:
        """Steps in which every context comes once."""
        return -(-len(self.groups) // contexts)

    def train_batch(self, step: int, contexts: int, share: float = 1.0) -> list[Example]:
        """See `Task.train_batch`; a share below 1 leaves out the longest contexts."""
        epoch, place = divmod(step, self.steps_per_epoch(contexts))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))
        chosen = [self.groups[index] for index in order[place * contexts : (place + 1) * contexts]]
        if share < 1:
            longest = self.lengths[max(0, round(share * len(self.lengths)) - 1)]
            short = [group for group in chosen if len(group[0].context) <= longest]
            chosen = short or [min(chosen, key=lambda group: len(group[0].context))]
        draw = np.random.default_rng([self.seed, 1, step])
        return [
            group[index]
            for group in chosen
            for index in sorted(draw.permutation(len(group))[: self.questions].tolist())
        ]

    def validation(self, contexts: int) -> list[Example]:
        """See `Task.validation`; at most `questions` on each context."""
        return [example for group in self.validated[:contexts] for example in group[: self.questions]]

    def test(self, contexts: int) -> list[Example]:
        """See `Task.test`; at most `questions` on each context."""
        return [example for group in self.tests[:contexts] for example in group[: self.questions]]


def _by_context(examples: Sequence[Example]) -> list[list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.context, []).append(example)
    return list(groups.values())
