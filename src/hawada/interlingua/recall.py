"""A task that cannot be guessed: so many facts "key value", then a question for the value of one key."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from hawada.interlingua.examples import Asked
from hawada.interlingua.llms.tokenizers import PieceTokenizer

SYLLABLES = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "za")
KEYS = tuple(first + second for first in SYLLABLES for second in SYLLABLES if first != second)[::3]
VALUES = tuple(f"{number:02d}" for number in range(100))
ASK = "?"
TRAIN, VALIDATION, TEST = 0, 1, 2


class Recall:
    """N facts and questions on them, asked with replacement; a key appears once in a context.

    Contexts are held out by composition: one in eight pairs of key and value is in test contexts alone, another one in
    validation contexts alone. Whoever knows the values but not which key has which is right in one case of N.

    Args:
        pairs: facts in a context, N.
        questions: on each context.
        seed: of everything that is drawn; which pairs are held out does not depend on it.

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
    def parts(self) -> NDArray[np.int64]:
        """Where each pair belongs, (keys, values): to `TRAIN`, `VALIDATION` or `TEST`."""
        drawn = np.random.default_rng(0).random((len(KEYS), len(VALUES)))
        return np.where(drawn < 1 / 8, TEST, np.where(drawn < 2 / 8, VALIDATION, TRAIN))

    def train_batch(self, step: int, contexts: int, share: float = 1.0) -> list[Asked]:
        """See `Task.train_batch`."""
        pairs = max(1, round(share * self.pairs))
        return self._examples(np.random.default_rng([self.seed, 1, step]), contexts, pairs, TRAIN)

    def validation(self, contexts: int) -> list[Asked]:
        """See `Task.validation`."""
        return self._examples(np.random.default_rng([0, 2, self.pairs]), contexts, self.pairs, VALIDATION)

    def test(self, contexts: int) -> list[Asked]:
        """See `Task.test`."""
        return self._examples(np.random.default_rng([0, 0, self.pairs]), contexts, self.pairs, TEST)

    def _examples(self, generator: Generator, contexts: int, pairs: int, part: int) -> list[Asked]:
        examples = []
        for _ in range(contexts):
            facts = self._facts(generator, pairs, part)
            text = " ".join(f"{key} {value}" for key, value in facts)
            for index in generator.integers(0, pairs, self.questions):
                key, value = facts[index]
                examples.append(Asked(text, key, (value,)))
        return examples

    def _facts(self, generator: Generator, pairs: int, part: int) -> list[tuple[str, str]]:
        keys = generator.choice(len(KEYS), pairs, replace=False)
        return [(KEYS[key], VALUES[generator.choice(np.flatnonzero(self.parts[key] == part))]) for key in keys]


def word_tokenizer() -> PieceTokenizer:
    """One token for each key and each value."""
    return PieceTokenizer(f"▁{word}" for word in (ASK, *KEYS, *VALUES))


def syllable_tokenizer() -> PieceTokenizer:
    """Two tokens for each key and each value: syllables and digits."""
    digits = [str(digit) for digit in range(10)]
    return PieceTokenizer([f"▁{ASK}", *(f"▁{piece}" for piece in (*SYLLABLES, *digits)), *SYLLABLES, *digits])
