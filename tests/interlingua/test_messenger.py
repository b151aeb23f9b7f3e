from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hawada.interlingua import ByteTokenizer, InterlinguaEncoder, LearnedQueries, LMWrapper, MeanPooling, Recall
from hawada.interlingua.encoder import ByteFeatures, PoolingFactory
from hawada.interlingua.examples import PlainExample
from hawada.interlingua.llms.prefix import Prefix
from hawada.interlingua.messenger import Messenger, SourceText
from hawada.interlingua.pooling import segments

EXAMPLES = Recall(3, 2).test(3)


def assert_same(one: Prefix, other: Prefix) -> None:
    if one.soft is not None:
        assert other.soft is not None
        assert torch.allclose(one.soft, other.soft, atol=1e-5)
    for (keys, values), (others, other_values) in zip(one.keys_values, other.keys_values, strict=True):
        assert torch.allclose(keys, others, atol=1e-5) and torch.allclose(values, other_values, atol=1e-5)


@pytest.mark.parametrize("kind", ["soft", "keys"])
@pytest.mark.parametrize("pooling", [MeanPooling, LearnedQueries])
def test_what_else_is_in_the_batch_changes_nothing(
    kind: str,
    pooling: PoolingFactory,
    llms: dict[str, LMWrapper],
    make_messenger: Callable[..., Messenger],
    prefixes: Callable[..., dict[str, Prefix]],
) -> None:
    messenger = make_messenger(llms, kind=kind, pooling=pooling).eval()
    longer = PlainExample("bade 11 bago 22 baka 33 bami 44 bapu 55", "bade", ("11",))
    together = prefixes(messenger, [*EXAMPLES, longer])
    for row, example in enumerate([*EXAMPLES, longer]):
        alone = prefixes(messenger, [example])
        for name in llms:
            assert_same(together[name].rows(torch.tensor([row])), alone[name])


def test_a_context_is_encoded_once_however_often_it_is_asked_about(
    llms: dict[str, LMWrapper], make_messenger: Callable[..., Messenger]
) -> None:
    messenger = make_messenger(llms)
    latents, index = messenger.latents(EXAMPLES)
    assert len(latents["llama"]) == 3 and index.tolist() == [0, 0, 1, 1, 2, 2]


def test_latents_know_neither_question_nor_answer_unless_they_are_to(
    llms: dict[str, LMWrapper], make_messenger: Callable[..., Messenger]
) -> None:
    example = EXAMPLES[0]
    others = [
        PlainExample(example.context, "something else that is much longer", example.answers),
        PlainExample(example.context, example.question, ("an answer of quite another length",)),
    ]
    agnostic = make_messenger(llms)
    for other in others:
        assert torch.equal(agnostic.latents([example])[0]["qwen"], agnostic.latents([other])[0]["qwen"])
    aware = make_messenger(llms, query_aware=True)
    assert not torch.allclose(aware.latents([example])[0]["qwen"], aware.latents(others[:1])[0]["qwen"])
    assert torch.equal(aware.latents([example])[0]["qwen"], aware.latents(others[1:])[0]["qwen"])


def test_it_is_known_whether_the_encoder_is_shown_an_answer() -> None:
    source = SourceText(ByteTokenizer(), limit=9)
    shown, cut = (PlainExample("the first the last", "which?", (answer,)) for answer in ("first", "last"))
    assert source.holds_answer(shown) and not source.holds_answer(cut)
    assert source.holds_answer(PlainExample("the first the last", "which?", ()))


def test_a_long_context_is_cut_and_a_question_never() -> None:
    source = SourceText(ByteTokenizer(), limit=20, query_aware=True)
    ids = source.ids(PlainExample("a" * 100, "who is it?", ("x",)))
    assert len(ids) == 20 and ByteTokenizer().decode(ids) == "a" * 9 + "\nwho is it?"
    assert (
        ByteTokenizer().decode(SourceText(ByteTokenizer(), limit=20).ids(PlainExample("b" * 100, "who?", ())))
        == "b" * 20
    )
    with pytest.raises(ValueError, match=r"interlingua\.max_source_tokens: 20 are not enough for a question of 31"):
        source.ids(PlainExample("a", "q" * 30, ()))


@pytest.mark.parametrize("kind", ["soft", "keys"])
def test_no_latents_are_no_prompt(
    kind: str,
    llms: dict[str, LMWrapper],
    make_messenger: Callable[..., Messenger],
    prefixes: Callable[..., dict[str, Prefix]],
) -> None:
    messenger = make_messenger(llms, kind=kind, latent_len=0)
    for name, llm in llms.items():
        prefix = prefixes(messenger, EXAMPLES)[name]
        prompts, targets = llm.prompts(EXAMPLES), llm.targets(EXAMPLES)
        assert torch.equal(llm.read(prefix, prompts, targets).logits, llm.read(Prefix(), prompts, targets).logits)


def test_private_latents_differ_and_shared_ones_do_not(
    llms: dict[str, LMWrapper], make_messenger: Callable[..., Messenger]
) -> None:
    latents, _ = make_messenger(llms, latent_len=4, private_len=1).latents(EXAMPLES)
    one, other = latents["llama"], latents["qwen"]
    assert one.shape == other.shape == (3, 4, 8)
    assert torch.equal(one[:, :3], other[:, :3]) and not torch.allclose(one[:, 3], other[:, 3])
    message = r"interlingua\.private_len: 5 is not between 0 and interlingua\.latent_len=4; set one of them to fit"
    with pytest.raises(ValueError, match=message):
        InterlinguaEncoder(ByteFeatures(16), LearnedQueries, ("a",), latent_len=4, d_z=8, private_len=5, width=16)


@pytest.mark.parametrize(("length", "latents"), [(8, 4), (7, 3), (2, 5), (1, 1)])
def test_mean_pooling_takes_equal_parts(length: int, latents: int) -> None:
    shares = segments(torch.arange(10)[None] < length, latents)[0]
    assert torch.allclose(shares.sum(1), torch.ones(latents, dtype=shares.dtype))
    assert float(shares[:, length:].abs().sum()) == 0.0
    assert torch.allclose(shares.sum(0)[:length] * length / latents, torch.ones(length, dtype=shares.dtype))
