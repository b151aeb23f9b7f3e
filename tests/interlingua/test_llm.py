from __future__ import annotations

from collections.abc import Callable

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from hawada.adapters.huggingface import CACHE_NAME
from hawada.interlingua import ByteTokenizer, LMWrapper, Recall
from hawada.interlingua.examples import Example, PlainExample
from hawada.interlingua.llms.llm import Template
from hawada.interlingua.llms.prefix import Prefix
from hawada.interlingua.llms.tokenizers import PretrainedTokenizer
from hawada.interlingua.messenger import context_ids
from hawada.interlingua.recall import word_tokenizer

EXAMPLES = Recall(3, 2).test(3)
MIXED = [PlainExample("bade 11", "bade", ("11",)), *EXAMPLES]  # contexts of two lengths


def own_logits(llm: LMWrapper, example: Example) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Logits and hidden states of the plain model on the whole text, at the answer's places, and the answer."""
    answer = llm.targets([example])[0]
    ids = [*llm.begin, *context_ids(llm, [example])[0], *llm.prompts([example])[0], *answer]
    out = llm.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    places = slice(len(ids) - len(answer) - 1, -1)
    return out.logits[0, places], [state[0, places] for state in out.hidden_states], torch.tensor(answer)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_the_contexts_own_embeddings_give_the_logits_of_the_text(name: str, request: pytest.FixtureRequest) -> None:
    llm = request.getfixturevalue(name)
    reading = llm.read(llm.text(context_ids(llm, MIXED)), llm.prompts(MIXED), llm.targets(MIXED), hidden=True)
    for row, example in enumerate(MIXED):
        logits, states, answer = own_logits(llm, example)
        count = len(answer)
        assert reading.mask[row].sum() == count and reading.targets[row, :count].tolist() == answer.tolist()
        assert close(reading.logits[row, :count], logits)
        assert all(close(own[row, :count], state) for own, state in zip(reading.hidden, states, strict=True))
    assert len(reading.hidden) == 3 and reading.hidden[0].shape == (*reading.mask.shape, llm.width)


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_the_texts_keys_and_values_give_the_logits_of_the_text(name: str, request: pytest.FixtureRequest) -> None:
    llm = request.getfixturevalue(name)
    ids = torch.tensor(context_ids(llm, EXAMPLES))
    begin = torch.tensor([llm.begin]).expand(len(ids), -1)
    cache = getattr(llm.model(input_ids=torch.cat([begin, ids], 1), use_cache=True), CACHE_NAME)
    prefix = Prefix(keys_values=tuple((layer.keys[:, :, 1:], layer.values[:, :, 1:]) for layer in cache.layers))
    prompts, targets = llm.prompts(EXAMPLES), llm.targets(EXAMPLES)
    reading, text = llm.read(prefix, prompts, targets), llm.read(llm.text(ids.tolist()), prompts, targets)
    assert close(reading.logits, text.logits)
    assert llm.generate(prefix, prompts, 5) == llm.generate(llm.text(ids.tolist()), prompts, 5)


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_padding_and_what_else_is_in_the_batch_change_nothing(name: str, request: pytest.FixtureRequest) -> None:
    llm = request.getfixturevalue(name)
    whole = llm.read(llm.text(context_ids(llm, MIXED)), llm.prompts(MIXED), llm.targets(MIXED))
    generated = llm.generate(llm.text(context_ids(llm, MIXED)), llm.prompts(MIXED), 4)
    for row, example in enumerate(MIXED):
        alone = [example]
        reading = llm.read(llm.text(context_ids(llm, alone)), llm.prompts(alone), llm.targets(alone))
        assert close(whole.logits[row, : reading.logits.shape[1]], reading.logits[0])
        assert llm.generate(llm.text(context_ids(llm, alone)), llm.prompts(alone), 4) == [generated[row]]


def test_generation_is_greedy_and_stops_at_the_end(llama: LMWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = llama.prompts(MIXED)
    prefix = llama.text(context_ids(llama, MIXED))
    found = llama.generate(prefix, prompts, 6)
    for row, example in enumerate(MIXED):
        ids = [*llama.begin, *context_ids(llama, [example])[0], *prompts[row]]
        expected: list[int] = []
        for _ in range(6):
            token = int(llama.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == llama.tokenizer.eos:
                break
            expected, ids = [*expected, token], [*ids, token]
        assert found[row] == expected
    monkeypatch.setattr(llama.tokenizer, "eos", found[0][2])
    assert llama.generate(prefix, prompts, 6)[0] == found[0][: found[0].index(found[0][2])]


def test_answers_end_with_the_end_and_begin_with_the_answer_in_every_model(llama: LMWrapper, qwen: LMWrapper) -> None:
    for llm in (llama, qwen):
        for example, ids in zip(MIXED, llm.targets(MIXED), strict=True):
            assert ids[-1] == llm.tokenizer.eos and ids.count(llm.tokenizer.eos) == 1
            assert ids[0] != llm.tokenizer.bos and llm.tokenizer.decode(ids[:-1]) == example.answers[0]
            assert llm.tokenizer.decode(ids[:1]) == example.answers[0][: len(llm.tokenizer.decode(ids[:1]))]


def test_a_question_without_an_answer_is_answered_by_the_end(llama: LMWrapper) -> None:
    assert llama.targets([PlainExample("bade 11", "bade", ())]) == [[llama.tokenizer.eos]]


def test_no_soft_tokens_are_no_prompt(llama: LMWrapper) -> None:
    prompts, targets = llama.prompts(MIXED), llama.targets(MIXED)
    empty = Prefix(torch.zeros(len(MIXED), 0, llama.width))
    assert torch.equal(llama.read(empty, prompts, targets).logits, llama.read(Prefix(), prompts, targets).logits)


def test_the_begin_token_follows_the_policy(make_llm: Callable[..., LMWrapper]) -> None:
    tokenizer = word_tokenizer()
    assert make_llm("a", tokenizer, "llama").begin == [tokenizer.bos]
    assert make_llm("a", tokenizer, "llama", bos="no").begin == []
    without = ByteTokenizer()
    without.bos = None  # type: ignore[assignment]  # in the place of a tokenizer that has no such token
    assert make_llm("a", without, "llama").begin == []
    with pytest.raises(ValueError, match=r"llms\.bos: the tokenizer of a has no begin token; set it to auto"):
        make_llm("a", without, "llama", bos="yes")
    with pytest.raises(ValueError, match=r"llms\.bos: 'maybe' is not one of auto, yes, no; set it to one of them"):
        make_llm("a", tokenizer, "llama", bos="maybe")


def test_gradients_flow_into_the_prefix_and_not_into_the_model(qwen: LMWrapper) -> None:
    soft = torch.randn(len(EXAMPLES), 2, qwen.width, requires_grad=True)
    reading = qwen.read(Prefix(soft), qwen.prompts(EXAMPLES), qwen.targets(EXAMPLES))
    torch.autograd.backward(reading.logits.sum())
    assert soft.grad is not None
    assert float(soft.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in qwen.model.parameters())


def test_the_anchor_stands_before_the_answer(make_llm: Callable[..., LMWrapper]) -> None:
    llm = LMWrapper(
        "a", make_llm("a", ByteTokenizer(), "llama").model, ByteTokenizer(), template=Template(anchor="Answer: ")
    )
    text = llm.tokenizer.decode(llm.prompts([PlainExample("c", "Who?", ("x",))])[0])
    assert text == "\nQuestion: Who?\nAnswer:"
    assert llm.tokenizer.decode(llm.targets([PlainExample("c", "Who?", ("x",))])[0]) == " x"


CHAT = (
    "{{ bos_token }}{% for message in messages %}<user>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat_tokenizer() -> PretrainedTokenizer:
    """A tokenizer of words with a begin token and a chat template, as those of chat models are."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "Who": 1, "Paris": 2}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # untyped in transformers
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    own.add_special_tokens({"additional_special_tokens": ["<user>", "<end>", "<assistant>"]})
    own.chat_template = CHAT
    return PretrainedTokenizer(own)


@pytest.mark.parametrize(("bos", "first"), [("auto", "<bos>"), ("yes", "<bos>"), ("no", "<bos>")])
def test_a_chat_header_stands_where_the_begin_token_stood(
    bos: str, first: str, chat_tokenizer: PretrainedTokenizer, make_llm: Callable[..., LMWrapper]
) -> None:
    head, tail = chat_tokenizer.chat()
    template = Template("{question}", "", head, tail)
    llm = LMWrapper("a", make_llm("a", word_tokenizer(), "llama").model, chat_tokenizer, template=template, bos=bos)
    names = chat_tokenizer.tokenizer.convert_ids_to_tokens
    assert names(llm.begin) == [first, "<user>"]
    assert names(llm.prompts([PlainExample("c", "Who", ("Paris",))])[0]) == ["Who", "<end>", "<assistant>"]
    conversation = chat_tokenizer.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Paris Who"}], add_generation_prompt=True, tokenize=False
    )
    whole = [
        *llm.begin,
        *context_ids(llm, [PlainExample("Paris", "", ())])[0],
        *llm.prompts([PlainExample("", "Who", ())])[0],
    ]
    assert whole == chat_tokenizer.encode(str(conversation))


def test_a_tokenizer_without_a_chat_template_is_refused(chat_tokenizer: PretrainedTokenizer) -> None:
    chat_tokenizer.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template; set llms\.chat=false"):
        chat_tokenizer.chat()


def test_an_answer_ends_at_the_stop(make_llm: Callable[..., LMWrapper]) -> None:
    llm = make_llm("a", ByteTokenizer(), "llama", stop="\n")
    assert llm.answer_text([*b" Paris\nQuestion: Where?"]) == "Paris" and llm.answer_text([*b"Paris"]) == "Paris"
    assert make_llm("a", ByteTokenizer(), "llama").answer_text([*b"a\nb"]) == "a\nb"


@pytest.mark.parametrize("bos", ["auto", "no"])
def test_keys_take_the_models_dtype(bos: str, make_llm: Callable[..., LMWrapper]) -> None:
    llm = make_llm("a", word_tokenizer(), "llama", bos=bos)
    llm.model.bfloat16()
    layers, heads, width = llm.cache_shape
    keys = tuple((torch.randn(len(EXAMPLES), heads, 3, width),) * 2 for _ in range(layers))
    reading = llm.read(Prefix(keys_values=keys), llm.prompts(EXAMPLES), llm.targets(EXAMPLES))
    assert reading.logits.dtype == torch.bfloat16 and torch.isfinite(reading.logits).all()


def test_what_begins_every_sequence_is_computed_once(make_llm: Callable[..., LMWrapper]) -> None:
    llm = make_llm("a", word_tokenizer(), "llama")
    layers, heads, width = llm.cache_shape
    prefix = Prefix(keys_values=tuple((torch.randn(len(EXAMPLES), heads, 3, width),) * 2 for _ in range(layers)))
    calls = []
    llm.model.register_forward_hook(lambda *_: calls.append(1))
    first, again = (llm.read(prefix, llm.prompts(EXAMPLES), llm.targets(EXAMPLES)).logits for _ in range(2))
    assert torch.equal(first, again) and len(calls) == 3
