from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch

from hawada.interlingua import LMWrapper, Recall
from hawada.interlingua.evaluation.answers import Answers, answer, answer_together, difference
from hawada.interlingua.evaluation.baselines import (
    Baseline,
    head,
    latent,
    nothing,
    oracle,
    quantized,
    scattered,
    shuffled,
    tail,
    text,
)
from hawada.interlingua.evaluation.cost import LatentPrefill, TextPrefill, cache_bytes, payload_bytes
from hawada.interlingua.examples import Example, PlainExample
from hawada.interlingua.messenger import Messenger, context_ids

EXAMPLES = [*Recall(3, 2).test(4), *Recall(2, 1).test(2)]


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_oracle_embeddings_answer_as_the_text(name: str, request: pytest.FixtureRequest) -> None:
    llm = request.getfixturevalue(name)
    one, other = answer(llm, text(), EXAMPLES, max_new_tokens=3), answer(llm, oracle(), EXAMPLES, max_new_tokens=3)
    assert one.texts == other.texts and np.allclose(one.nll, other.nll, atol=1e-5) and one.tokens == other.tokens


def test_figures_are_those_of_the_models_own_probabilities(llama: LMWrapper) -> None:
    found = answer(llama, text(), EXAMPLES, batch=4)
    for row, example in enumerate(EXAMPLES):
        expected = llama.targets([example])[0]
        ids = [*llama.begin, *context_ids(llama, [example])[0], *llama.prompts([example])[0], *expected]
        logs = llama.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)[-len(expected) - 1 : -1]
        own = logs[torch.arange(len(expected)), expected]
        assert found.nll[row] == pytest.approx(-float(own[:-1].mean()), abs=1e-5)  # the end does not count
        rank = int((logs[0] > own[0]).sum())
        assert (found.top1[row], found.top5[row]) == (rank < 1, rank < 5)


def shown_ids(llm: LMWrapper, baseline: Baseline, example: Example) -> list[int]:
    prompt = llm.prompts([example])[0]
    return baseline(llm, [example]).prompts[0][: -len(prompt)]


def test_truncation_keeps_so_many_tokens_and_the_whole_question(llama: LMWrapper) -> None:
    example = EXAMPLES[0]
    whole = context_ids(llama, [example])[0]
    assert shown_ids(llama, text(), example) == whole and shown_ids(llama, nothing(), example) == []
    assert shown_ids(llama, head(2), example) == whole[:2] and shown_ids(llama, tail(2), example) == whole[-2:]
    some = shown_ids(llama, scattered(3), example)
    assert len(some) == 3 and some == [token for token in whole if token in some]
    assert shown_ids(llama, scattered(3), example) == some
    for baseline in (head(99), tail(99), scattered(99)):
        assert shown_ids(llama, baseline, example) == whole


def test_shuffled_latents_are_those_of_another_context(
    llms: dict[str, LMWrapper], make_messenger: Callable[..., Messenger]
) -> None:
    messenger = make_messenger(llms).eval()
    contexts = [example.context for example in EXAMPLES]
    swapped = shuffled(messenger, contexts)(llms["llama"], EXAMPLES).prefix.soft
    own = latent(messenger)(llms["llama"], EXAMPLES).prefix.soft
    assert swapped is not None and own is not None
    different = list(dict.fromkeys(contexts))
    for row, context in enumerate(contexts):
        other = different[(different.index(context) + 1) % len(different)]
        assert torch.allclose(swapped[row], own[contexts.index(other)], atol=1e-6)
        assert not torch.allclose(swapped[row], own[row], atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_latents_are_near_and_take_few_values(bits: int) -> None:
    z = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    rounded = quantized(bits)(z)
    step = z.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert bool(((rounded - z).abs() <= step / 2 + 1e-6).all())
    assert max(len(torch.unique(row)) for row in rounded.flatten(0, 1)) <= 2**bits - 1


def test_differences_are_paired() -> None:
    one, other = np.array([1.0, 1.0, 0.0, 1.0] * 25), np.array([1.0, 0.0, 0.0, 1.0] * 25)
    contexts = [str(number) for number in range(100)]
    found = difference(one, other, contexts)
    assert found["mean"] == 0.25 and 0.15 < found["low"] < 0.25 < found["high"] < 0.35
    assert difference(one, one, contexts) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_questions_on_one_context_are_no_more_evidence_than_one() -> None:
    one, other = np.repeat([1.0, 0.0] * 5, 10), np.zeros(100)
    alone = difference(one, other, [str(number) for number in range(100)])
    together = difference(one, other, [str(number // 10) for number in range(100)])
    assert together["mean"] == alone["mean"] == 0.5
    assert together["high"] - together["low"] > 2 * (alone["high"] - alone["low"])


def test_an_answer_that_one_model_has_no_tokens_for_is_not_the_joint_one(llms: dict[str, LMWrapper]) -> None:
    examples = EXAMPLES[:2]
    baselines = {name: text() for name in llms}
    alone = {"llama": given(["4", "11"], examples), "qwen": given(["11", "ba"], examples)}
    labelled = [PlainExample(example.context, example.question, ("11",)) for example in examples]
    assert answer_together(llms, baselines, alone, labelled)["em"] == 1.0


def test_one_context_cannot_be_shuffled(llms: dict[str, LMWrapper], make_messenger: Callable[..., Messenger]) -> None:
    with pytest.raises(ValueError, match="one context cannot be shuffled"):
        shuffled(make_messenger(llms), ["a", "a"])


def given(texts: Sequence[str], examples: Sequence[Example]) -> Answers:
    right = np.array([float(t in e.answers) for t, e in zip(texts, examples, strict=True)])
    return Answers(list(texts), right, right, right, right, right, 0.0)


def test_the_joint_answer_is_the_one_that_all_find_most_probable(llms: dict[str, LMWrapper]) -> None:
    examples = EXAMPLES[:4]
    baselines = {name: text() for name in llms}
    alone = {"llama": given(["11", "22", "33", "44"], examples), "qwen": given(["11", "55", "66", "77"], examples)}

    def score(candidate: str, example: Example) -> float:
        total = 0.0
        for llm in llms.values():
            asked = PlainExample(example.context, example.question, (candidate,))
            expected = llm.targets([asked])[0]
            ids = [*llm.begin, *context_ids(llm, [asked])[0], *llm.prompts([asked])[0], *expected]
            logs = llm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)[-len(expected) - 1 : -1]
            total += float(logs[torch.arange(len(expected)), expected].sum())
        return total

    best = [
        max((one, other), key=partial(score, example=example))
        for one, other, example in zip(alone["llama"].texts, alone["qwen"].texts, examples, strict=True)
    ]
    labelled = [
        PlainExample(example.context, example.question, (text,)) for example, text in zip(examples, best, strict=True)
    ]
    found = answer_together(llms, baselines, alone, labelled)
    assert found["em"] == 1.0 and found["agreement"] == 0.25
    wrong = [PlainExample(example.context, example.question, ("nothing",)) for example in examples]
    assert answer_together(llms, baselines, alone, wrong)["em"] == 0.0


def test_what_is_timed_gives_the_logits_that_answers_come_from(
    llms: dict[str, LMWrapper], make_messenger: Callable[..., Messenger]
) -> None:
    messenger, llm = make_messenger(llms), llms["qwen"]
    shown = latent(messenger)(llm, EXAMPLES)
    expected = llm.read(shown.prefix, shown.prompts, llm.targets(EXAMPLES)).logits[:, :1]
    assert torch.allclose(TextPrefill(llm, shown)(torch.zeros(1)), expected, atol=1e-5)
    for encode in (False, True):
        timed = LatentPrefill(llm, messenger, EXAMPLES, encode=encode)
        assert torch.allclose(timed(torch.zeros(1)), expected, atol=1e-5)


def test_bytes_of_payload_and_cache(llama: LMWrapper) -> None:
    assert payload_bytes(4, 64) == {"fp16": 512, "int8": 264, "int4": 136}
    # two layers, keys and values, two KV heads of width 4, two bytes each
    assert cache_bytes(llama, 10) == 2 * 2 * 2 * 4 * 10 * 2
