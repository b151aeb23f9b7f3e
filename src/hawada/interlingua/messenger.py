"""Connect encoder and adapters: from examples to the prefix that each language model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from hawada.interlingua.encoder import InterlinguaEncoder, LearnedPrompt
from hawada.interlingua.examples import Example
from hawada.interlingua.features import Feature
from hawada.interlingua.llms.llm import LMWrapper, padded_right
from hawada.interlingua.llms.prefix import Prefix
from hawada.interlingua.llms.tokenizers import Tokenizer


@dataclass(frozen=True)
class SourceText:
    """Choose what the encoder sees of an example.

    Attributes:
        tokenizer: the tokenizer of the encoder.
        limit: the most tokens that the encoder sees; a longer context is cut at its end, a question never.
        query_aware: whether the encoder sees the question too; without it, latents must carry whatever may be asked.
        separator: the text between context and question.
    """

    tokenizer: Tokenizer
    limit: int
    query_aware: bool = False
    separator: str = "\n"

    def ids(self, example: Example) -> tuple[int, ...]:
        """Return the ids that the encoder sees of one example.

        Raises:
            ValueError: when the question leaves no room for the context.
        """
        context, question = self._parts(example)
        return (*context, *question)

    def holds_answer(self, example: Example) -> bool:
        """Tell whether an answer is in the part of the context that is kept; True for a question without answers."""
        kept = self.tokenizer.decode(self._parts(example)[0])
        return not example.answers or any(answer in kept for answer in example.answers)

    def _parts(self, example: Example) -> tuple[list[int], list[int]]:
        """Return the ids of the context, cut to fit, and of the question, empty where it is not shown."""
        question = self.tokenizer.encode(self.separator + example.question) if self.query_aware else []
        if len(question) >= self.limit:
            raise ValueError(
                f"interlingua.max_source_tokens: {self.limit} are not enough for a question of {len(question)} tokens "
                "and a context; set it higher"
            )
        return self.tokenizer.encode(example.context)[: self.limit - len(question)], question


class Messenger(nn.Module):
    """Hold the encoder, and an adapter for each language model; the models themselves are no part of it.

    Args:
        encoder: the module that turns texts into latents.
        adapters: the modules that turn latents into a prefix, by the name of the model.
        source: the choice of what the encoder sees of an example.
        features: features by name, see `hawada.interlingua.features`; whoever builds this attaches them to the models.
    """

    def __init__(
        self,
        encoder: InterlinguaEncoder | LearnedPrompt,
        adapters: Mapping[str, nn.Module],
        source: SourceText,
        features: Mapping[str, Feature] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.adapters, self.source = encoder, nn.ModuleDict(adapters), source
        self.features = nn.ModuleDict(features or {})

    @property
    def device(self) -> torch.device:
        """The device that the parameters are on."""
        return next(self.parameters()).device

    def latents(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
        """Encode every different source text once.

        Returns:
            The latents for each model by name, of shape (texts, latent_len, d_z), and for each example the row of its
            text.
        """
        ids, mask, index = self.sources(examples)
        return self.encoder(ids, mask), index

    def sources(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids and mask of every different source text, (texts, tokens), and the row of each example's text."""
        rows = [self.source.ids(example) for example in examples]
        different = {ids: place for place, ids in enumerate(dict.fromkeys(rows))}
        ids, mask = padded_right(list(different), self.device)
        return ids, mask, torch.tensor([different[row] for row in rows], device=self.device)

    def prefix(self, name: str, z: Tensor) -> Prefix:
        """Turn the latents for one model, (batch, latent_len, d_z), into the prefix that it reads, row by row."""
        prefix: Prefix = self.adapters[name](z)
        for feature in self.features_by_name().values():
            prefix = feature.prefix(name, z, prefix)
        return prefix

    def features_by_name(self) -> dict[str, Feature]:
        """Return the features by name, in the order of the configuration."""
        return cast(dict[str, Feature], dict(self.features.items()))

    @torch.no_grad()
    def cosine(self, examples: Sequence[Example]) -> float:
        """Compute the mean cosine between the latents of different texts; near 1, they have collapsed into one."""
        latents, _ = self.latents(examples)
        means = []
        for z in latents.values():
            flat = nn.functional.normalize(z.flatten(1).float(), dim=1)
            count = len(flat)
            means.append(float((flat @ flat.T).sum() - count) / max(1, count * (count - 1)))
        return sum(means) / len(means)


def context_ids(llm: LMWrapper, examples: Sequence[Example]) -> list[list[int]]:
    """Return the ids of each context in the tokens of a language model."""
    return [llm.tokenizer.encode(example.context) for example in examples]
