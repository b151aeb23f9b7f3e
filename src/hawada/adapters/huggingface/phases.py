"""The phases of a causal language model as modules that can be timed: prefill, decode and generate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# The argument of a model's forward pass that takes the cache; the library renamed it, and older versions know one name.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class PinnedLayer(StaticLayer):  # type: ignore[no-untyped-call, unused-ignore]  # a base has no type hints
    """A layer of a static cache that always writes at one position, so that every call finds the same fixed length."""

    def __init__(self, max_cache_len: int, position: int) -> None:
        super().__init__(max_cache_len)
        self.position = position

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            self.cumulative_length.fill_(self.position)
        else:
            self.lazy_initialization(key_states, value_states)
            self.cumulative_length.fill_(self.position)
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.position


class PinnedCache(Cache):
    """A static cache in which every call begins at `position`.

    Position 0 stands for a reset cache, and the length of the prompt for a cache that holds the prompt.

    The keys and values before the position are zeros, which take the same time as any others. A copy starts empty,
    so that a sliced attention allocates its own width.
    """

    def __init__(self, layers: int, max_cache_len: int, position: int) -> None:
        super().__init__(layers=[PinnedLayer(max_cache_len, position) for _ in range(layers)])
        self.shape = (layers, max_cache_len, position)

    def __deepcopy__(self, memo: dict[int, Any]) -> PinnedCache:
        return PinnedCache(*self.shape)


def _last_logits(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Run the model on ids, (batch, tokens), with a cache; the logits of the last position, (batch, 1, vocabulary)."""
    logits: Tensor = model(ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1).logits
    return logits


class Prefill(nn.Module):
    """One forward pass over the prompt's ids, (batch, prompt), into a reset static cache.

    It returns the logits of the last position, (batch, 1, vocabulary).
    """

    def __init__(self, model: PreTrainedModel, max_cache_len: int) -> None:
        super().__init__()
        self.model = model
        self.cache = PinnedCache(model.config.num_hidden_layers, max_cache_len, 0)

    def forward(self, input_ids: Tensor) -> Tensor:
        return _last_logits(self.model, input_ids, self.cache)


class Decode(nn.Module):
    """One further token after a prompt that is in the cache; the first call takes its ids, (batch, 1).

    Each later call goes on from the token that the call before chose, and all return logits, (batch, 1, vocabulary).

    Consecutive calls are chained single-token steps at a fixed cache length, so their mean time is the time per output
    token, (t_last - t_first) / (n - 1).
    """

    def __init__(self, model: PreTrainedModel, prompt: int, max_cache_len: int) -> None:
        super().__init__()
        self.model = model
        self.cache = PinnedCache(model.config.num_hidden_layers, max_cache_len, prompt)
        self.token: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "token": None}  # a copy begins with the ids it is given, perhaps on another device

    def forward(self, input_ids: Tensor) -> Tensor:
        token = input_ids if self.token is None else self.token
        logits = _last_logits(self.model, token, self.cache)
        self.token = logits[:, -1:].argmax(-1)  # (batch, 1)
        return logits


class Generate(nn.Module):
    """A forward pass over the prompt's ids, (batch, prompt), then greedy steps; returns the (batch, new_tokens) ids."""

    def __init__(self, model: PreTrainedModel, new_tokens: int, max_cache_len: int) -> None:
        super().__init__()
        self.model, self.new_tokens, self.max_cache_len = model, new_tokens, max_cache_len
        self.cache: StaticCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": None}  # a copy starts empty, as that of a PinnedCache does

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.max_cache_len)
        else:
            self.cache.reset()  # type: ignore[no-untyped-call, unused-ignore]  # the library gives it no type hints
        tokens, token = [], input_ids
        for _ in range(self.new_tokens):
            logits = _last_logits(self.model, token, self.cache)
            token = logits[:, -1:].argmax(-1)  # (batch, 1)
            tokens.append(token)
        return torch.cat(tokens, dim=1)
