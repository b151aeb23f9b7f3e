"""Pool the features of a text of any length into a fixed number of latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MeanPooling(nn.Module):
    """Cut the text into equal parts, one for each latent, and average the tokens of each part.

    A token on a border counts in both parts, in each by the share of it that lies there.

    Args:
        latents: the number of latents.
        width: the width of the features.
    """

    def __init__(self, latents: int, width: int) -> None:
        super().__init__()
        self.latents = latents

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Pool features (batch, tokens, width) into (batch, latents, width).

        Args:
            features: the features of the tokens.
            mask: a mask of shape (batch, tokens), True for the text at the beginning of each row.
        """
        return torch.einsum("bmt,btd->bmd", segments(mask, self.latents).to(features), features)


def segments(mask: Tensor, latents: int) -> Tensor:
    """Compute the share of each token in each part, (batch, latents, tokens); the shares of a part sum to 1."""
    length = mask.sum(1).clamp_min(1).view(-1, 1, 1).float()
    token = torch.arange(mask.shape[1], device=mask.device).view(1, 1, -1)
    part = torch.arange(latents, device=mask.device).view(1, -1, 1)
    low, high = part * length / latents, (part + 1) * length / latents
    overlap = (torch.minimum(token + 1.0, high) - torch.maximum(token.float(), low)).clamp_min(0)
    overlap = overlap * mask[:, None]
    return overlap / overlap.sum(-1, keepdim=True).clamp_min(1e-12)


class LearnedQueries(nn.Module):
    """Attend from learned queries, one for each latent, to the text: Jaegle et al., Perceiver, 2021.

    Args:
        latents: the number of latents.
        width: the width of the features.
        layers: the number of layers; each has attention among the latents, attention to the text and a feed-forward
            network.
        heads: the number of heads of each attention.
    """

    def __init__(self, latents: int, width: int, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(latents, width) * width**-0.5)
        layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(width))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Pool features (batch, tokens, width) into (batch, latents, width).

        Args:
            features: the features of the tokens.
            mask: a mask of shape (batch, tokens), True where there is text.
        """
        queries = self.queries.expand(len(features), -1, -1)
        pooled: Tensor = self.layers(queries, features, memory_key_padding_mask=~mask)
        return pooled
