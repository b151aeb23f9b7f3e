"""Encoder and adapters together: from examples to what each model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hawada.interlingua.encoder import InterlinguaEncoder, LearnedPrompt
from hawada.interlingua.examples import Example
from hawada.interlingua.features import Feature
from hawada.interlingua.llms.llm import LMWrapper, padded_right
from hawada.interlingua.llms.prefix import Prefix
from hawada.interlingua.llms.tokenizers import Tokenizer


@dataclass(frozen=True)
class Source:
    """What the encoder is shown of an example.

    Attributes:
        tokenizer: its text to ids.
        limit: most tokens; a context that is longer is cut at its end, a question never.
        query_aware: whether it is shown the question too; without it, latents must carry whatever may be asked.
        separator: between context and question.
    """

    tokenizer: Tokenizer
    limit: int
    query_aware: bool = False
    separator: str = "\n"

    def ids(self, example: Example) -> tuple[int, ...]:
        """Ids of one example.

        Raises:
            ValueError: when the question alone is too long.
        """
        context, question = self._parts(example)
        return (*context, *question)

    def holds_answer(self, example: Example) -> bool:
        """Whether an answer can be read in what is left of the context; of a question that has none, yes."""
        kept = self.tokenizer.decode(self._parts(example)[0])
        return not example.answers or any(answer in kept for answer in example.answers)

    def _parts(self, example: Example) -> tuple[list[int], list[int]]:
        """Ids of the context, cut, and of the question, where it is shown."""
        question = self.tokenizer.encode(self.separator + example.question) if self.query_aware else []
        if len(question) >= self.limit:
            raise ValueError(
                f"interlingua.max_source_tokens: {self.limit} are not enough for a question of {len(question)} tokens "
                "and a context; set it higher"
            )
        return self.tokenizer.encode(example.context)[: self.limit - len(question)], question


class Messenger(nn.Module):
    """Encoder and one adapter for each model; the models themselves are no part of it.

    Args:
        encoder: texts to latents.
        adapters: latents to a prefix, by the model's name.
        source: what the encoder is shown.
        features: by name, see `hawada.interlingua.features`; they are attached to the models before they are used.
    """

    def __init__(
        self,
        encoder: InterlinguaEncoder | LearnedPrompt,
        adapters: Mapping[str, nn.Module],
        source: Source,
        features: Mapping[str, Feature] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.adapters, self.source = encoder, nn.ModuleDict(adapters), source
        self.features = nn.ModuleDict(features or {})

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(self.parameters()).device

    def latents(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
        """Latents of every different source text, (texts, latent_len, d_z) for each model, and each example's row."""
        ids, mask, index = self.sources(examples)
        return self.encoder(ids, mask), index

    def sources(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
        """Every different source text's ids and mask, (texts, tokens), and each example's row."""
        rows = [self.source.ids(example) for example in examples]
        different = {ids: place for place, ids in enumerate(dict.fromkeys(rows))}
        ids, mask = padded_right(list(different), self.device)
        return ids, mask, torch.tensor([different[row] for row in rows], device=self.device)

    def prefix(self, name: str, z: Tensor) -> Prefix:
        """What a model reads of its latents, (batch, latent_len, d_z); a row for each of them."""
        prefix: Prefix = self.adapters[name](z)
        for feature in self.every_feature().values():
            prefix = feature.prefix(name, z, prefix)
        return prefix

    def every_feature(self) -> dict[str, Feature]:
        """Its features by name, in the order of the configuration."""
        return dict(self.features.items())  # type: ignore[arg-type]

    @torch.no_grad()
    def cosine(self, examples: Sequence[Example]) -> float:
        """Mean cosine between the latents of different texts; near 1, latents say the same of all."""
        latents, _ = self.latents(examples)
        means = []
        for z in latents.values():
            flat = nn.functional.normalize(z.flatten(1).float(), dim=1)
            count = len(flat)
            means.append(float((flat @ flat.T).sum() - count) / max(1, count * (count - 1)))
        return sum(means) / len(means)


def context_ids(llm: LMWrapper, examples: Sequence[Example]) -> list[list[int]]:
    """Ids of each context as a model reads it as text."""
    return [llm.tokenizer.encode(example.context) for example in examples]
