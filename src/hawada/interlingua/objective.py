"""What a prefix is trained on for one model: the losses that are switched on, with their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hawada.interlingua.examples import Example
from hawada.interlingua.llms.llm import LMWrapper, Reading
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
    """Weights of the losses; 0 switches one off.

    Attributes:
        answer_ce_weight: cross-entropy of the answer with its end.
        k_token_ce_weight: of its first k tokens.
        first_token_ce_weight: of its first token.
        kd_first_k_weight: distillation of the first k tokens, from the same model reading the text.
        kd_answer_weight: of the whole answer.
        kd_hidden_weight: mean squared difference of hidden states at the first k tokens.
        scale_weight: soft tokens' scale against the embeddings'.
        k: how many tokens are the first.
        kd_temperature: of distillation.

    Raises:
        ValueError: for a number out of range, or when nothing would be learned.
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
                raise ValueError(f"interlingua.objective.{name}: {getattr(self, name)} is negative; 0 switches it off")
        if not any(getattr(self, name) for name in weights if name != "scale_weight"):
            raise ValueError("interlingua.objective: every weight is 0, so nothing is learned; set answer_ce_weight=1")
        if self.k < 1 or not self.kd_temperature > 0:
            raise ValueError("interlingua.objective: k must be at least 1 and kd_temperature above 0")

    @property
    def needs_text(self) -> bool:
        """Whether the model must also read the text."""
        return self.kd_first_k_weight > 0 or self.kd_answer_weight > 0 or self.kd_hidden_weight > 0

    def losses(self, llm: LMWrapper, prefix: Prefix, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The weighted terms; scalars whose sum is the loss.

        Args:
            llm: reads the prefix.
            prefix: one row for each example.
            examples: what is asked.
        """
        prompts, answers = llm.prompts(examples), llm.answers(examples)
        hidden = self.kd_hidden_weight > 0
        said = llm.read(prefix, prompts, answers, hidden=hidden)
        terms = {
            "answer_ce": self.answer_ce_weight * _once(self.answer_ce_weight, said, None),
            "k_token_ce": self.k_token_ce_weight * _once(self.k_token_ce_weight, said, self.k),
            "first_token_ce": self.first_token_ce_weight * _once(self.first_token_ce_weight, said, 1),
        }
        if self.needs_text:
            with torch.no_grad(), llm.as_pretrained():
                text = llm.read(llm.text(context_ids(llm, examples)), prompts, answers, hidden=hidden)
            for name, weight, k in (
                ("kd_first_k", self.kd_first_k_weight, self.k),
                ("kd_answer", self.kd_answer_weight, None),
            ):
                if weight:
                    terms[name] = weight * kd_first_k_prefix_vs_text(
                        said.logits, text.logits, said.mask, k, self.kd_temperature
                    )
            if hidden:
                terms["kd_hidden"] = self.kd_hidden_weight * kd_hidden_states_first_k(
                    said.hidden, text.hidden, said.mask, self.k
                )
        if self.scale_weight and prefix.soft is not None:
            terms["scale"] = self.scale_weight * scale_penalty(prefix.soft, llm.embedding_rms)
        return {name: term for name, term in terms.items() if isinstance(term, Tensor)}


def _once(weight: float, said: Reading, k: int | None) -> Tensor | float:
    """A cross-entropy that is wanted, or nothing."""
    return k_token_ce_from_prefix(said.logits, said.targets, said.mask, k) if weight else 0.0
