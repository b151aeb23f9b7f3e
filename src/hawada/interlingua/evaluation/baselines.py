"""What a language model can be shown of a context: the latents, and everything they must be compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hawada.interlingua.examples import Asked, Example
from hawada.interlingua.llms.llm import LMWrapper
from hawada.interlingua.llms.prefix import Prefix
from hawada.interlingua.messenger import Messenger, context_ids

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shown:
    """What a model reads for each example of a batch.

    Attributes:
        prefix: soft tokens or keys and values, or nothing.
        prompts: ids behind it, up to the answer.
        tokens: places in the cache that stand for the context, on average.
        as_pretrained: whether the model reads it without what features added to it.
    """

    prefix: Prefix
    prompts: list[list[int]]
    tokens: float
    as_pretrained: bool = True


Contender = Callable[[LMWrapper, Sequence[Example]], Shown]


def text() -> Contender:
    """The plain context, as ids."""
    return _cut(lambda ids, _: ids)


def oracle() -> Contender:
    """The context's own embeddings on the way that soft tokens take; must equal `text`."""

    def show(llm: LMWrapper, examples: Sequence[Example]) -> Shown:
        contexts = context_ids(llm, examples)
        return Shown(llm.text(contexts), llm.prompts(examples), _mean_length(contexts))

    return show


def nothing() -> Contender:
    """The question alone."""
    return _cut(lambda ids, _: [])


def head(tokens: int) -> Contender:
    """The context's first tokens."""
    return _cut(lambda ids, _: ids[:tokens])


def tail(tokens: int) -> Contender:
    """Its last ones."""
    return _cut(lambda ids, _: ids[len(ids) - min(tokens, len(ids)) :])


def scattered(tokens: int, seed: int = 0) -> Contender:
    """Random ones in their order, the same for the same context."""

    def cut(ids: list[int], context: str) -> list[int]:
        generator = np.random.default_rng([seed, *context.encode()])
        return [ids[place] for place in sorted(generator.permutation(len(ids))[:tokens])]

    return _cut(cut)


def latent(messenger: Messenger, change: Change | None = None) -> Contender:
    """The latents, changed on the way if so wished."""

    @torch.no_grad()
    def show(llm: LMWrapper, examples: Sequence[Example]) -> Shown:
        messenger.eval()
        latents, index = messenger.latents(examples)
        z = latents[llm.name]
        prefix = messenger.prefix(llm.name, z if change is None else change(z)).rows(index)
        return Shown(prefix, llm.prompts(examples), float(prefix.places), as_pretrained=not messenger.features)

    return show


def shuffled(messenger: Messenger, contexts: Sequence[str]) -> Contender:
    """The latents of another context: what is right then was guessed.

    Args:
        messenger: makes them.
        contexts: of everything that is asked; each is answered from the next different one.

    Raises:
        ValueError: when there is only one.
    """
    different = list(dict.fromkeys(contexts))
    if len(different) < 2:
        raise ValueError("data: one context cannot be shuffled; set interlingua.test_contexts to 2 or more")
    following = dict(zip(different, different[1:] + different[:1], strict=True))
    show = latent(messenger)
    return lambda llm, examples: show(
        llm, [Asked(following[example.context], example.question, tuple(example.answers)) for example in examples]
    )


def quantized(bits: int) -> Change:
    """Rounds each latent to integers of so many bits and one scale, symmetric."""
    largest = 2 ** (bits - 1) - 1

    def change(z: Tensor) -> Tensor:
        scale = z.abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest
        return (z / scale).round().clamp(-largest, largest) * scale

    return change


def _cut(cut: Callable[[list[int], str], list[int]]) -> Contender:
    def show(llm: LMWrapper, examples: Sequence[Example]) -> Shown:
        contexts = [
            cut(ids, example.context) for ids, example in zip(context_ids(llm, examples), examples, strict=True)
        ]
        prompts = [[*context, *prompt] for context, prompt in zip(contexts, llm.prompts(examples), strict=True)]
        return Shown(Prefix(), prompts, _mean_length(contexts))

    return show


def _mean_length(rows: Sequence[Sequence[int]]) -> float:
    return float(np.mean([len(row) for row in rows]))
