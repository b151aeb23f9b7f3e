"""The phases of a causal language model as things that can be timed: prefill, decode, generate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# What a model's forward pass and its output call the cache: the library renamed it, and older versions know one name.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class PinnedLayer(StaticLayer):
    """A layer of a static cache that always writes at one position: every call finds the same fixed-length cache."""

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
    """A static cache whose calls all begin at `position`: 0 is a reset cache, `prompt` one that holds the prompt.

    The keys and values before the position are zeros, which take the same time as any others. A copy starts empty,
    so that a sliced attention allocates its own width.
    """

    def __init__(self, layers: int, max_cache_len: int, position: int) -> None:
        super().__init__(layers=[PinnedLayer(max_cache_len, position) for _ in range(layers)])
        self.shape = (layers, max_cache_len, position)

    def __deepcopy__(self, memo: dict[int, Any]) -> PinnedCache:
        return PinnedCache(*self.shape)


class Prefill(nn.Module):
    """One forward pass over the prompt, (batch, prompt) ids, into a reset static cache; logits of the last position."""

    def __init__(self, model: PreTrainedModel, max_cache_len: int) -> None:
        super().__init__()
        self.model = model
        self.cache = PinnedCache(model.config.num_hidden_layers, max_cache_len, 0)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, **{CACHE_NAME: self.cache}, use_cache=True, logits_to_keep=1).logits


class Decode(nn.Module):
    """One further token, (batch, 1) ids, behind a prompt that is in the cache; each call goes on from the last's token.

    Calls in a row are chained single-token steps at a fixed cache length, so their mean time is the time per output
    token, (t_last - t_first) / (n - 1).
    """

    def __init__(self, model: PreTrainedModel, prompt: int, max_cache_len: int) -> None:
        super().__init__()
        self.model = model
        self.cache = PinnedCache(model.config.num_hidden_layers, max_cache_len, prompt)
        self.token: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "token": None}  # a copy starts anew, perhaps on another device

    def forward(self, input_ids: Tensor) -> Tensor:
        token = input_ids if self.token is None else self.token
        logits = self.model(token, **{CACHE_NAME: self.cache}, use_cache=True, logits_to_keep=1).logits
        self.token = logits[:, -1:].argmax(-1)  # (batch, 1)
        return logits


class Generate(nn.Module):
    """The prompt, (batch, prompt) ids, and then greedily all new tokens; returns them, (batch, new_tokens)."""

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
            self.cache.reset()
        tokens, token = [], input_ids
        for _ in range(self.new_tokens):
            logits = self.model(token, **{CACHE_NAME: self.cache}, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(-1)  # (batch, 1)
            tokens.append(token)
        return torch.cat(tokens, dim=1)
