"""What latents cost and save: time until the first token, bytes to send, bytes of cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hawada.interlingua.evaluation.baselines import Shown
from hawada.interlingua.examples import Example
from hawada.interlingua.llms.llm import LMWrapper
from hawada.interlingua.messenger import Messenger


class Prefill(nn.Module):
    """A model reading what it is shown, up to the first token of the answer; for the profiler, which calls it.

    Args:
        llm: reads.
        shown: what it reads.
    """

    def __init__(self, llm: LMWrapper, shown: Shown) -> None:
        super().__init__()
        self.llm, self.shown = llm, shown
        self.ends = [[0]] * len(shown.prompts)  # one answer token, of which nothing but its logits is asked

    @torch.inference_mode()
    def forward(self, _: Tensor) -> Tensor:
        """The logits of the first answer token, (batch, 1, vocabulary)."""
        with self.llm.as_pretrained(self.shown.as_pretrained):
            return self.llm.read(self.shown.prefix, self.shown.prompts, self.ends).logits


class LatentPrefill(nn.Module):
    """Likewise from latents: adapted, read, and encoded before where that is asked for.

    Texts are ids already, as they are for `Prefill`.

    Args:
        llm: reads.
        messenger: encodes and adapts.
        examples: what is asked.
        encode: whether encoding is timed too, as a sender and a receiver in one would do it.
    """

    def __init__(self, llm: LMWrapper, messenger: Messenger, examples: Sequence[Example], *, encode: bool) -> None:
        super().__init__()
        self.llm, self.encode = llm, encode
        self.messengers = (messenger.eval(),)  # no submodule, as the model is none: what moves this moves neither
        self.prompts, self.ends = llm.prompts(examples), [[0]] * len(examples)
        self.ids, self.mask, self.index = messenger.sources(examples)
        with torch.inference_mode():
            self.latents = messenger.encoder(self.ids, self.mask)[llm.name]

    @torch.inference_mode()
    def forward(self, _: Tensor) -> Tensor:
        """The logits of the first answer token, (batch, 1, vocabulary)."""
        (messenger,) = self.messengers
        latents = messenger.encoder(self.ids, self.mask)[self.llm.name] if self.encode else self.latents
        prefix = messenger.prefix(self.llm.name, latents).rows(self.index)
        return self.llm.read(prefix, self.prompts, self.ends).logits


def payload_bytes(latents: int, d_z: int) -> dict[str, int]:
    """Bytes of one context's latents as sent: half precision, or integers with a half-precision scale each."""
    return {
        "fp16": 2 * latents * d_z,
        "int8": latents * (d_z + 2),
        "int4": latents * (-(-d_z // 2) + 2),
    }


def cache_bytes(llm: LMWrapper, tokens: float, bytes_per_value: int = 2) -> float:
    """Bytes of keys and values of so many tokens.

    Args:
        llm: whose.
        tokens: places in the cache.
        bytes_per_value: 2 in half precision.
    """
    layers, heads, width = llm.cache_shape
    return 2.0 * layers * heads * width * tokens * bytes_per_value
