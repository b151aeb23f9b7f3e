"""What latents cost and save: the time to the first token, the bytes to send and the bytes of cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hawada.interlingua.evaluation.baselines import Shown
from hawada.interlingua.examples import Example
from hawada.interlingua.llms.llm import LMWrapper
from hawada.interlingua.messenger import Messenger


class TextPrefill(nn.Module):
    """Run a language model on text, or on whatever else it is shown, up to the first token of the answer.

    It is a module so that the profiler can time it.

    Args:
        llm: the language model.
        shown: what the model reads.
    """

    def __init__(self, llm: LMWrapper, shown: Shown) -> None:
        super().__init__()
        self.llm, self.shown = llm, shown
        self.targets = [[0]] * len(
            shown.prompts
        )  # one answer token each; its id does not matter, as only logits are read

    @torch.inference_mode()
    def forward(self, _: Tensor) -> Tensor:
        """Return the logits of the first answer token, (batch, 1, vocabulary)."""
        with self.llm.as_pretrained(self.shown.as_pretrained):
            return self.llm.read(self.shown.prefix, self.shown.prompts, self.targets).logits


class LatentPrefill(nn.Module):
    """Run adapter and language model on latents up to the first token of the answer, and the encoder where asked.

    Tokenizing is no part of it, as it is no part of `TextPrefill`.

    Args:
        llm: the language model.
        messenger: the encoder and adapters.
        examples: the examples whose questions are asked.
        encode: whether each call encodes the texts too, as where one machine sends and receives; otherwise they are
            encoded once, before.
    """

    def __init__(self, llm: LMWrapper, messenger: Messenger, examples: Sequence[Example], *, encode: bool) -> None:
        super().__init__()
        self.llm, self.encode = llm, encode
        self.messengers = (
            messenger.eval(),
        )  # in a tuple it is no submodule, so that moving this module does not move it
        self.prompts, self.targets = llm.prompts(examples), [[0]] * len(examples)
        self.ids, self.mask, self.index = messenger.sources(examples)
        with torch.inference_mode():
            self.latents = messenger.encoder(self.ids, self.mask)[llm.name]

    @torch.inference_mode()
    def forward(self, _: Tensor) -> Tensor:
        """Return the logits of the first answer token, (batch, 1, vocabulary)."""
        (messenger,) = self.messengers
        latents = messenger.encoder(self.ids, self.mask)[self.llm.name] if self.encode else self.latents
        prefix = messenger.prefix(self.llm.name, latents).rows(self.index)
        return self.llm.read(prefix, self.prompts, self.targets).logits


def payload_bytes(latents: int, d_z: int) -> dict[str, int]:
    """Return the bytes that the latents of one context take when they are sent.

    Args:
        latents: the number of latents.
        d_z: the width of a latent.

    Returns:
        Bytes in half precision, and as integers of 8 and 4 bits with a half-precision scale for each latent.
    """
    return {
        "fp16": 2 * latents * d_z,
        "int8": latents * (d_z + 2),
        "int4": latents * (-(-d_z // 2) + 2),
    }


def cache_bytes(llm: LMWrapper, tokens: float, bytes_per_value: int = 2) -> float:
    """Return the bytes of the keys and values of so many tokens.

    Args:
        llm: the language model whose cache it is.
        tokens: the number of places in the cache.
        bytes_per_value: the bytes of one number, 2 in half precision.
    """
    layers, heads, width = llm.cache_shape
    return 2.0 * layers * heads * width * tokens * bytes_per_value
