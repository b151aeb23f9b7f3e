"""A task that cannot be guessed: a context of facts "key value", then a question for the value of one key."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from hawada.interlingua.examples import PlainExample
from hawada.interlingua.llms.tokenizers import PieceTokenizer

SYLLABLES = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "za")
KEYS = tuple(first + second for first in SYLLABLES for second in SYLLABLES if first != second)[::3]
VALUES = tuple(f"{number:02d}" for number in range(100))
QUESTION_MARK = "?"
TRAIN, VALIDATION, TEST = 0, 1, 2  # the splits that a pair of key and value may belong to


class Recall:
    """Draw contexts of N facts, each a pair of key and value, and questions on them, with replacement.

    A key comes once in a context. Contexts are held out by composition: one in eight pairs of key and value is in test
    contexts alone, and another one in eight in validation contexts alone. A model that knows the values of a context
    but not the keys that they belong to is right in one case of N.

    Args:
        pairs: the number N of facts in a context.
        questions: the number of questions on each context.
        seed: the seed of training batches; which pairs are held out, and the other splits, do not depend on it.

    Raises:
        ValueError: when there are fewer keys than pairs, or a number is below 1.
    """

    def __init__(self, pairs: int = 4, questions: int = 4, seed: int = 0) -> None:
        if not 1 <= pairs <= len(KEYS):
            raise ValueError(f"data.pairs: {pairs} is not between 1 and {len(KEYS)}, the number of keys; set it to one")
        if questions < 1:
            raise ValueError(f"data.questions: {questions} is not at least 1; set data.questions to 1 or more")
        self.pairs, self.questions, self.seed = pairs, questions, seed

    @cached_property
    def splits(self) -> NDArray[np.int64]:
        """The split of each pair of key and value, `TRAIN`, `VALIDATION` or `TEST`, as an array (keys, values)."""
        drawn = np.random.default_rng(0).random((len(KEYS), len(VALUES)))
        return np.where(drawn < 1 / 8, TEST, np.where(drawn < 2 / 8, VALIDATION, TRAIN))

    def train_batch(self, step: int, contexts: int, share: float = 1.0) -> list[PlainExample]:
        """Return a batch, see `Task.train_batch`; a share below 1 gives contexts with fewer facts."""
        pairs = max(1, round(share * self.pairs))
        return self._examples(np.random.default_rng([self.seed, 1, step]), contexts, pairs, TRAIN)

    def validation(self, contexts: int) -> list[PlainExample]:
        """Return validation examples, see `Task.validation`."""
        return self._examples(np.random.default_rng([0, 2, self.pairs]), contexts, self.pairs, VALIDATION)

    def test(self, contexts: int) -> list[PlainExample]:
        """Return test examples, see `Task.test`."""
        return self._examples(np.random.default_rng([0, 0, self.pairs]), contexts, self.pairs, TEST)

    def _examples(self, generator: Generator, contexts: int, pairs: int, split: int) -> list[PlainExample]:
        examples = []
        for _ in range(contexts):
            facts = self._facts(generator, pairs, split)
            text = " ".join(f"{key} {value}" for key, value in facts)
            for index in generator.integers(0, pairs, self.questions):
                key, value = facts[index]
                examples.append(PlainExample(text, key, (value,)))
        return examples

    def _facts(self, generator: Generator, pairs: int, split: int) -> list[tuple[str, str]]:
        keys = generator.choice(len(KEYS), pairs, replace=False)
        return [(KEYS[key], VALUES[generator.choice(np.flatnonzero(self.splits[key] == split))]) for key in keys]


def word_tokenizer() -> PieceTokenizer:
    """Make a tokenizer with one token for each key and each value."""
    return PieceTokenizer(f"▁{word}" for word in (QUESTION_MARK, *KEYS, *VALUES))


def syllable_tokenizer() -> PieceTokenizer:
    """Make a tokenizer with two tokens for each key and each value, its syllables or digits."""
    digits = [str(digit) for digit in range(10)]
    return PieceTokenizer([f"▁{QUESTION_MARK}", *(f"▁{piece}" for piece in (*SYLLABLES, *digits)), *SYLLABLES, *digits])
