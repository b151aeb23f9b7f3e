from __future__ import annotations

from typing import Any

import pytest

from hawada.interlingua import Recall
from hawada.interlingua.examples import Example
from hawada.interlingua.llms.tokenizers import Tokenizer
from hawada.interlingua.recall import KEYS, VALUES, syllable_tokenizer, word_tokenizer


def facts(example: Example) -> list[tuple[str, str]]:
    words = example.context.split()
    return list(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize("pairs", [1, 2, 4, 8])
def test_the_answer_is_the_value_of_the_key_and_keys_appear_once(pairs: int) -> None:
    task = Recall(pairs, 3)
    for examples in (task.train_batch(0, 20), task.validation(20), task.test(20)):
        assert len(examples) == 60
        for example in examples:
            given = dict(facts(example))
            assert len(given) == pairs and example.answers == (given[example.question],)


def test_no_pair_of_the_test_contexts_is_ever_trained_on() -> None:
    task = Recall(4, 1)
    trained = {fact for step in range(200) for example in task.train_batch(step, 16) for fact in facts(example)}
    tested = {fact for example in task.test(500) for fact in facts(example)}
    validated = {fact for example in task.validation(500) for fact in facts(example)}
    assert not trained & tested and not validated & (trained | tested) and len(trained) > 3000 and len(validated) > 300
    assert {key for key, _ in tested} == set(KEYS) == {key for key, _ in trained}


def test_questions_are_asked_with_replacement() -> None:
    asked = [example.question for example in Recall(4, 4).train_batch(0, 50)]
    rows = [asked[start : start + 4] for start in range(0, len(asked), 4)]
    assert any(len(set(row)) < 4 for row in rows) and any(len(set(row)) > 2 for row in rows)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    assert Recall(4, 2, seed=3).train_batch(7, 5) == Recall(4, 2, seed=3).train_batch(7, 5)
    assert Recall(4, 2, seed=3).train_batch(7, 5) != Recall(4, 2, seed=3).train_batch(8, 5)
    assert Recall(4, 2, seed=3).train_batch(7, 5) != Recall(4, 2, seed=4).train_batch(7, 5)
    assert Recall(4, 2, seed=3).test(5) == Recall(4, 2, seed=4).test(5)


def test_a_curriculum_begins_with_fewer_facts() -> None:
    task = Recall(8, 1)
    assert len(facts(task.train_batch(0, 1, 0.25)[0])) == 2 and len(facts(task.train_batch(0, 1, 1.0)[0])) == 8


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), syllable_tokenizer()])
def test_tokenizers_give_back_what_they_were_given(tokenizer: Tokenizer) -> None:
    for text in ("bade 47", f"{KEYS[0]} {VALUES[0]} {KEYS[-1]} {VALUES[-1]} ? {KEYS[3]}"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(1 < index < tokenizer.vocabulary for index in ids)


def test_the_two_tokenizations_share_no_word() -> None:
    words, syllables = word_tokenizer(), syllable_tokenizer()
    for word in (*KEYS, *VALUES):
        assert len(words.encode(word)) == 1 and len(syllables.encode(word)) == 2
    with pytest.raises(ValueError, match="'xyz': the tokenizer has no pieces for"):
        words.encode("xyz")


@pytest.mark.parametrize(
    ("options", "message"), [({"pairs": 0}, "data.pairs: 0"), ({"questions": 0}, "data.questions")]
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recall(**options)
