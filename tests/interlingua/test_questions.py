from __future__ import annotations

from collections.abc import Sequence

import pytest

from hawada.interlingua.examples import Example, PlainExample
from hawada.interlingua.questions import Questions

CONTEXTS = 41
TRAIN = [
    PlainExample("word " * (number + 1), f"question {index}?", ("x",))
    for number in range(CONTEXTS)
    for index in range(3)
]
TEST = [PlainExample(f"other {number}", f"question {index}?", ("x",)) for number in range(5) for index in range(3)]


def contexts(examples: Sequence[Example]) -> list[str]:
    return list(dict.fromkeys(example.context for example in examples))


def test_an_epoch_shows_every_context_once_and_none_of_the_others() -> None:
    task = Questions(TRAIN, TEST, questions=2)
    assert task.steps_per_epoch(4) == 9
    first, second = ([contexts(task.train_batch(start + step, 4)) for step in range(9)] for start in (0, 9))
    for epoch in (first, second):
        shown = [context for batch in epoch for context in batch]
        assert len(shown) == len(set(shown)) == CONTEXTS - 8
    assert first != second
    watched = contexts(task.validation(64))
    assert len(watched) == 8 and not set(watched) & {context for batch in first for context in batch}
    assert set(contexts(task.test(5))) == set(contexts(TEST)) != set(contexts(task.test(3)))


def test_questions_on_a_context_are_asked_together_and_no_more_than_so_many() -> None:
    task = Questions(TRAIN, TEST, questions=2)
    batch = task.train_batch(3, 4)
    assert [example.context for example in batch[::2]] == [example.context for example in batch[1::2]]
    assert len(batch) == 8 and len(task.test(5)) == 10 and len(task.validation(64)) == 16


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    assert Questions(TRAIN, TEST, seed=1).train_batch(5, 4) == Questions(TRAIN, TEST, seed=1).train_batch(5, 4)
    assert Questions(TRAIN, TEST, seed=1).train_batch(5, 4) != Questions(TRAIN, TEST, seed=2).train_batch(5, 4)
    assert Questions(TRAIN, TEST, seed=1).validation(9) == Questions(TRAIN, TEST, seed=2).validation(9)


def test_a_curriculum_leaves_out_the_longest_contexts() -> None:
    task = Questions(TRAIN, TEST)
    limit = sorted(len(group[0].context) for group in task.groups)[round(0.5 * len(task.groups)) - 1]
    for step in range(10):
        shown = contexts(task.train_batch(step, 8, 0.5))
        assert shown and (len(shown) == 1 or all(len(context) <= limit for context in shown))


def test_too_few_contexts_are_refused() -> None:
    with pytest.raises(ValueError, match="data: questions on 1 contexts are too few to train on"):
        Questions(TRAIN[:3], TEST)
