"""Losses of a language model that reads a prefix. They cover the positions of the answer; padding never counts.

Targets are already shifted: `targets[:, t]` is token t of the answer, whose last one is the end token, and
`logits[:, t]` are the logits that predict it. `mask[:, t]` is True where the answer has a token t.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hawada.core.distill import hidden_mse, kd_loss


def first_k(mask: Tensor, k: int | None) -> Tensor:
    """Restrict a mask of answer tokens, (batch, tokens), to the first k of each answer; None keeps all."""
    return mask if k is None else mask & (torch.arange(mask.shape[1], device=mask.device) < k)


def k_token_ce_from_prefix(logits: Tensor, targets: Tensor, mask: Tensor, k: int | None = None) -> Tensor:
    """Compute the mean cross-entropy of the first k answer tokens under teacher forcing, in nats per token.

    Args:
        logits: logits of shape (batch, tokens, vocabulary).
        targets: ids of the answer tokens, of shape (batch, tokens), int64.
        mask: a mask of shape (batch, tokens), bool.
        k: how many tokens of each answer count; None: the whole answer with its end.
    """
    chosen = first_k(mask, k)
    return F.cross_entropy(logits[chosen].float(), targets[chosen])


def kd_first_k_prefix_vs_text(
    prefix_logits: Tensor, text_logits: Tensor, mask: Tensor, k: int | None = None, temperature: float = 1.0
) -> Tensor:
    """Distil the model that reads the text into the same model with a prefix: tau^2 * KL(text || prefix) per token.

    Hinton et al., Distilling the Knowledge in a Neural Network, 2015.

    Args:
        prefix_logits: logits of the model that reads the prefix, of shape (batch, tokens, vocabulary).
        text_logits: logits of the model that reads the text, of the same shape; they receive no gradient.
        mask: a mask of shape (batch, tokens), bool.
        k: how many tokens of each answer count; None: all.
        temperature: the temperature tau.
    """
    chosen = first_k(mask, k)
    return kd_loss(prefix_logits[chosen], text_logits.detach()[chosen], temperature)


def kd_hidden_states_first_k(
    prefix_hidden: Sequence[Tensor], text_hidden: Sequence[Tensor], mask: Tensor, k: int | None = None
) -> Tensor:
    """Compute the mean squared difference of hidden states, relative to the mean square of those with the text.

    Args:
        prefix_hidden: hidden states of each layer with the prefix, (batch, tokens, width), at the positions that
            predict the answer tokens.
        text_hidden: hidden states of the model that reads the text, likewise; they receive no gradient.
        mask: a mask of shape (batch, tokens), bool.
        k: how many tokens of each answer count; None: all.
    """
    return hidden_mse(prefix_hidden, [state.detach() for state in text_hidden], valid=first_k(mask, k))


def scale_penalty(soft: Tensor, rms: float) -> Tensor:
    """Compute the mean squared logarithm of each soft token's RMS over that of the embeddings; 0 when they are equal.

    Args:
        soft: soft tokens of shape (batch, latents, width).
        rms: the root mean square of the model's own embeddings.
    """
    own = soft.float().square().mean(-1).clamp_min(1e-12).sqrt()
    return (own / rms).log().square().mean()
