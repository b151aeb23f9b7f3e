"""The training objective for one language model: the losses that are switched on, with their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hawada.interlingua.examples import Example
from hawada.interlingua.llms.llm import LMWrapper
from hawada.interlingua.llms.prefix import Prefix
from hawada.interlingua.losses import (
    k_token_ce_from_prefix,
    kd_first_k_prefix_vs_text,
    kd_hidden_states_first_k,
    scale_penalty,
)
from hawada.interlingua.messenger import context_ids


@dataclass(frozen=True)
class Objective:
    """Weights of the losses; 0 switches a loss off.

    Attributes:
        answer_ce_weight: the weight of the cross-entropy of the whole answer with its end.
        k_token_ce_weight: the weight of the cross-entropy of its first `k` tokens.
        first_token_ce_weight: the weight of the cross-entropy of its first token.
        kd_first_k_weight: the weight of the distillation of the first `k` tokens from the same model with the text.
        kd_answer_weight: the weight of the same distillation of the whole answer.
        kd_hidden_weight: the weight of the difference of hidden states from those with the text, at the first `k`
            tokens.
        scale_weight: the weight of the penalty on soft tokens whose scale is not that of the embeddings.
        k: how many tokens of an answer the losses of first tokens cover.
        kd_temperature: the temperature of distillation.

    Raises:
        ValueError: when a weight is negative, all losses are off, `k` is below 1 or the temperature is not above 0.
    """

    answer_ce_weight: float = 1.0
    k_token_ce_weight: float = 0.0
    first_token_ce_weight: float = 0.5
    kd_first_k_weight: float = 0.0
    kd_answer_weight: float = 0.0
    kd_hidden_weight: float = 0.0
    scale_weight: float = 0.0
    k: int = 4
    kd_temperature: float = 1.0

    def __post_init__(self) -> None:
        weights = [field.name for field in fields(self) if field.name.endswith("_weight")]
        for name in weights:
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"interlingua.objective.{name}: {getattr(self, name)} is negative; set it to 0 or more, where "
                    "0 switches the loss off"
                )
        if not any(getattr(self, name) for name in weights if name != "scale_weight"):
            raise ValueError("interlingua.objective: every weight is 0, so nothing is learned; set answer_ce_weight=1")
        if self.k < 1 or not self.kd_temperature > 0:
            raise ValueError(
                f"interlingua.objective: k must be at least 1 and kd_temperature above 0, and they are {self.k} and "
                f"{self.kd_temperature}; set them so"
            )

    @property
    def needs_text(self) -> bool:
        """Whether the language model must read the text too, to distil from."""
        return self.kd_first_k_weight > 0 or self.kd_answer_weight > 0 or self.kd_hidden_weight > 0

    def losses(self, llm: LMWrapper, prefix: Prefix, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Compute the weighted terms by name, scalars whose sum is the loss.

        Args:
            llm: the language model that reads the prefix.
            prefix: the prefix, with one row for each example.
            examples: the examples whose questions are asked.
        """
        prompts, targets = llm.prompts(examples), llm.targets(examples)
        hidden = self.kd_hidden_weight > 0
        reading = llm.read(prefix, prompts, targets, hidden=hidden)
        terms: dict[str, Tensor] = {}
        for name, weight, k in (
            ("answer_ce", self.answer_ce_weight, None),
            ("k_token_ce", self.k_token_ce_weight, self.k),
            ("first_token_ce", self.first_token_ce_weight, 1),
        ):
            if weight:
                terms[name] = weight * k_token_ce_from_prefix(reading.logits, reading.targets, reading.mask, k)
        if self.needs_text:
            with torch.no_grad(), llm.as_pretrained():
                text = llm.read(llm.text(context_ids(llm, examples)), prompts, targets, hidden=hidden)
            for name, weight, k in (
                ("kd_first_k", self.kd_first_k_weight, self.k),
                ("kd_answer", self.kd_answer_weight, None),
            ):
                if weight:
                    terms[name] = weight * kd_first_k_prefix_vs_text(
                        reading.logits, text.logits, reading.mask, k, self.kd_temperature
                    )
            if hidden:
                terms["kd_hidden"] = self.kd_hidden_weight * kd_hidden_states_first_k(
                    reading.hidden, text.hidden, reading.mask, self.k
                )
        if self.scale_weight and prefix.soft is not None:
            terms["scale"] = self.scale_weight * scale_penalty(prefix.soft, llm.embedding_rms)
        return terms
