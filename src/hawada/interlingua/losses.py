"""What a reader of soft tokens is trained on. Positions are those of the answer; what is padded never counts.

Targets are already shifted: `targets[:, t]` is the answer's token t, the end included, and `logits[:, t]` are those
from which it is to be predicted. `mask[:, t]` is True where the answer has such a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hawada.core.distill import hidden_mse, kd_loss


def first_k(mask: Tensor, k: int | None) -> Tensor:
    """The mask, (batch, tokens), of the first k answer tokens; None: of all."""
    return mask if k is None else mask & (torch.arange(mask.shape[1], device=mask.device) < k)


def k_token_ce_from_prefix(logits: Tensor, targets: Tensor, mask: Tensor, k: int | None = None) -> Tensor:
    """Mean cross-entropy of the first k answer tokens, teacher-forced; None: of the whole answer with its end.

    Args:
        logits: (batch, tokens, vocabulary).
        targets: (batch, tokens), int64.
        mask: (batch, tokens), bool.
        k: how many tokens of each answer count.
    """
    chosen = first_k(mask, k)
    return F.cross_entropy(logits[chosen].float(), targets[chosen])


def kd_first_k_prefix_vs_text(
    prefix_logits: Tensor, text_logits: Tensor, mask: Tensor, k: int | None = None, temperature: float = 1.0
) -> Tensor:
    """tau^2 * KL from the model that reads the text to the same model that reads soft tokens, mean over tokens.

    Hinton et al., Distilling the Knowledge in a Neural Network, 2015.

    Args:
        prefix_logits: (batch, tokens, vocabulary).
        text_logits: likewise; no gradient flows there.
        mask: (batch, tokens), bool.
        k: how many tokens of each answer count; None: all.
        temperature: tau.
    """
    chosen = first_k(mask, k)
    return kd_loss(prefix_logits[chosen], text_logits.detach()[chosen], temperature)


def kd_hidden_states_first_k(
    prefix_hidden: Sequence[Tensor], text_hidden: Sequence[Tensor], mask: Tensor, k: int | None = None
) -> Tensor:
    """Mean squared difference of hidden states at the same answer tokens, relative to the text's mean square.

    Args:
        prefix_hidden: states of each layer, (batch, tokens, width), from which answer token t is predicted.
        text_hidden: likewise, of the model that reads the text.
        mask: (batch, tokens), bool.
        k: how many tokens of each answer count; None: all.
    """
    return hidden_mse(prefix_hidden, [state.detach() for state in text_hidden], valid=first_k(mask, k))


def scale_penalty(soft: Tensor, rms: float) -> Tensor:
    """Mean squared logarithm of each soft token's RMS over the embeddings' RMS; 0 at the right scale.

    Args:
        soft: (batch, latents, width).
        rms: of the model's own embeddings.
    """
    own = soft.float().square().mean(-1).clamp_min(1e-12).sqrt()
    return (own / rms).log().square().mean()
