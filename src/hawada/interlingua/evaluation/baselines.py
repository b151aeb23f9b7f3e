"""What a language model is shown of a context: the latents, and the baselines that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hawada.interlingua.examples import Example, PlainExample
from hawada.interlingua.llms.llm import LMWrapper
from hawada.interlingua.llms.prefix import Prefix
from hawada.interlingua.messenger import Messenger, context_ids

LatentChange = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shown:
    """What a language model reads for each example of a batch.

    Attributes:
        prefix: soft tokens, keys and values, or nothing, with one row for each example.
        prompts: the ids behind the prefix, up to the answer, a row for each example.
        tokens: how many places in the cache stand for the context, on average.
        as_pretrained: whether what features added to the model is switched off while it reads.
    """

    prefix: Prefix
    prompts: list[list[int]]
    tokens: float
    as_pretrained: bool = True


# Shows a model the contexts of a batch in one way; the latents themselves are one of these ways, beside the baselines.
Baseline = Callable[[LMWrapper, Sequence[Example]], Shown]


def text() -> Baseline:
    """Show the plain context, as ids."""
    return _cut(lambda ids, _: ids)


def oracle() -> Baseline:
    """Show the embeddings of the context in the place of soft tokens, which must give the same as `text`."""

    def show(llm: LMWrapper, examples: Sequence[Example]) -> Shown:
        contexts = context_ids(llm, examples)
        return Shown(llm.text(contexts), llm.prompts(examples), _mean_length(contexts))

    return show


def nothing() -> Baseline:
    """Show the question alone."""
    return _cut(lambda ids, _: [])


def head(tokens: int) -> Baseline:
    """Show the first tokens of the context."""
    return _cut(lambda ids, _: ids[:tokens])


def tail(tokens: int) -> Baseline:
    """Show the last tokens of the context."""
    return _cut(lambda ids, _: ids[len(ids) - min(tokens, len(ids)) :])


def scattered(tokens: int, seed: int = 0) -> Baseline:
    """Show random tokens of the context in their order, always the same ones of the same context."""

    def cut(ids: list[int], context: str) -> list[int]:
        generator = np.random.default_rng([seed, *context.encode()])
        return [ids[place] for place in sorted(generator.permutation(len(ids))[:tokens])]

    return _cut(cut)


def latent(messenger: Messenger, change: LatentChange | None = None) -> Baseline:
    """Show the latents, changed before the adapter where `change` is given."""

    @torch.no_grad()
    def show(llm: LMWrapper, examples: Sequence[Example]) -> Shown:
        messenger.eval()
        latents, index = messenger.latents(examples)
        z = latents[llm.name]
        prefix = messenger.prefix(llm.name, z if change is None else change(z)).rows(index)
        return Shown(prefix, llm.prompts(examples), float(prefix.places), as_pretrained=not messenger.features)

    return show


def shuffled(messenger: Messenger, contexts: Sequence[str]) -> Baseline:
    """Show the latents of another context; an answer that is right all the same was guessed.

    Args:
        messenger: the encoder and adapters that make the latents.
        contexts: the contexts of all examples; the latents of each are replaced by those of the next different one.

    Raises:
        ValueError: when all contexts are the same.
    """
    different = list(dict.fromkeys(contexts))
    if len(different) < 2:
        raise ValueError("data: one context cannot be shuffled; set interlingua.test_contexts to 2 or more")
    following = dict(zip(different, different[1:] + different[:1], strict=True))
    show = latent(messenger)
    return lambda llm, examples: show(
        llm,
        [PlainExample(following[example.context], example.question, tuple(example.answers)) for example in examples],
    )


def quantized(bits: int) -> LatentChange:
    """Round each latent to integers of so many bits, symmetric about 0, with one scale for each latent."""
    largest = 2 ** (bits - 1) - 1

    def change(z: Tensor) -> Tensor:
        scale = z.abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest
        rounded: Tensor = (z / scale).round().clamp(-largest, largest) * scale
        return rounded

    return change


def _cut(cut: Callable[[list[int], str], list[int]]) -> Baseline:
    """Show the ids that `cut` keeps, given all ids of a context and its text."""

    def show(llm: LMWrapper, examples: Sequence[Example]) -> Shown:
        contexts = [
            cut(ids, example.context) for ids, example in zip(context_ids(llm, examples), examples, strict=True)
        ]
        prompts = [[*context, *prompt] for context, prompt in zip(contexts, llm.prompts(examples), strict=True)]
        return Shown(Prefix(), prompts, _mean_length(contexts))

    return show


def _mean_length(rows: Sequence[Sequence[int]]) -> float:
    return float(np.mean([len(row) for row in rows]))
