from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hawada.interlingua import Adapter, ByteTokenizer, InterlinguaEncoder, LearnedQueries, LMWrapper
from hawada.interlingua.adapter import PrefixAdapter
from hawada.interlingua.encoder import ByteFeatures, PoolingFactory
from hawada.interlingua.examples import Example
from hawada.interlingua.llms.llm import Template
from hawada.interlingua.llms.prefix import Prefix
from hawada.interlingua.llms.tiny import small_causal_lm
from hawada.interlingua.llms.tokenizers import Tokenizer
from hawada.interlingua.messenger import Messenger, SourceText
from hawada.interlingua.recall import syllable_tokenizer, word_tokenizer

TEMPLATE = Template(question=" ? {question} ", anchor="")
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}


def small(name: str, tokenizer: Tokenizer, model_type: str, width: int = 16, **options: Any) -> LMWrapper:
    """An untrained model of a family; its weights are large enough to tell inputs apart."""
    torch.manual_seed(0)
    model = small_causal_lm(model_type, tokenizer.vocabulary, hidden_size=width, max_position_embeddings=128, **SIZES)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return LMWrapper(name, model, tokenizer, template=TEMPLATE, **options)


@pytest.fixture
def make_llm() -> Callable[..., LMWrapper]:
    return small


@pytest.fixture
def llama() -> LMWrapper:
    return small("llama", word_tokenizer(), "llama")


@pytest.fixture
def qwen() -> LMWrapper:
    return small("qwen", syllable_tokenizer(), "qwen2", width=24)


@pytest.fixture
def llms(llama: LMWrapper, qwen: LMWrapper) -> dict[str, LMWrapper]:
    return {"llama": llama, "qwen": qwen}


@pytest.fixture
def prefixes() -> Callable[..., dict[str, Prefix]]:
    """What each model reads of some examples, a row for each."""

    def read(messenger: Messenger, examples: Sequence[Example]) -> dict[str, Prefix]:
        latents, index = messenger.latents(examples)
        return {name: messenger.prefix(name, latents[name]).rows(index) for name in messenger.adapters}

    return read


@pytest.fixture
def make_messenger() -> Callable[..., Messenger]:
    return messenger


def messenger(
    llms: dict[str, LMWrapper],
    *,
    kind: str = "soft",
    latent_len: int = 3,
    d_z: int = 8,
    pooling: PoolingFactory = LearnedQueries,
    query_aware: bool = False,
    limit: int = 64,
    **options: Any,
) -> Messenger:
    """Bytes to latents to soft tokens or keys and values, untrained."""
    torch.manual_seed(1)
    encoder = InterlinguaEncoder(
        ByteFeatures(16), pooling, tuple(llms), latent_len=latent_len, d_z=d_z, width=16, layers=1, **options
    )
    adapters = {}
    for name, llm in llms.items():
        adapters[name] = (
            Adapter(d_z, latent_len, llm.width, llm.embedding_rms, hidden=16)
            if kind == "soft"
            else PrefixAdapter(d_z, latent_len, *llm.cache_shape, hidden=16)
        )
    return Messenger(encoder, adapters, SourceText(ByteTokenizer(), limit, query_aware))
