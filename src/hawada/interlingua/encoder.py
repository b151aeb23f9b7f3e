"""Encode a text into a few latents, which the adapter of every language model can use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hawada.interlingua.llms.tokenizers import ByteTokenizer

PoolingFactory = Callable[[int, int], nn.Module]


class ByteFeatures(nn.Module):
    """Look up a learned embedding for each byte.

    Args:
        width: the width of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(ByteTokenizer.vocabulary, width)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Map ids of shape (batch, tokens) to features of shape (batch, tokens, width)."""
        features: Tensor = self.table(ids)
        return features


class FrozenFeatures(nn.Module):
    """Project what a frozen language model computes from the text: its input embeddings, or a layer's hidden states.

    The language model is no part of this module's state.

    Args:
        read: a function from ids and mask, both of shape (batch, tokens), to the model's features of shape
            (batch, tokens, size); it is called without gradient.
        size: the width of what `read` returns.
        width: the width of the features.
    """

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor], size: int, width: int) -> None:
        super().__init__()
        self.read = read
        self.norm = nn.LayerNorm(size)
        self.project = nn.Linear(size, width)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Map ids and mask of shape (batch, tokens) to features of shape (batch, tokens, width)."""
        with torch.no_grad():
            features = self.read(ids, mask)
        projected: Tensor = self.project(self.norm(features.float()))
        return projected


def positions(count: int, width: int, device: torch.device) -> Tensor:
    """Compute sines and cosines of each position, (count, width); Vaswani et al., Attention is all you need, 2017."""
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    angle = torch.arange(count, device=device)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


class InterlinguaEncoder(nn.Module):
    """Encode texts: features, a transformer over them, pooling, and a projection to latents of width `d_z`.

    All language models share the first latents; the last `private_len` of each model are its own.

    Args:
        features: a module from ids and mask, (batch, tokens), to features of shape (batch, tokens, width).
        pooling: a function from the number of latents and the width to a module, see `hawada.interlingua.pooling`.
        model_names: the names of the language models that the latents are for.
        latent_len: the number of latents that each model gets, shared and own.
        private_len: how many of these are its own.
        d_z: the width of a latent.
        width: the width of the features.
        layers: the number of the transformer's layers; 0 leaves it out.
        heads: the number of its attention heads.

    Raises:
        ValueError: when `private_len` is negative or more than `latent_len`.
    """

    def __init__(
        self,
        features: nn.Module,
        pooling: PoolingFactory,
        model_names: Sequence[str],
        *,
        latent_len: int,
        d_z: int,
        private_len: int = 0,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if not 0 <= private_len <= latent_len:
            raise ValueError(
                f"interlingua.private_len: {private_len} is not between 0 and interlingua.latent_len={latent_len}; "
                "set one of them to fit"
            )
        self.model_names, self.latent_len, self.private_len = tuple(model_names), latent_len, private_len
        self.features = features
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False) if layers else None
        self.norm = nn.LayerNorm(width)
        self.shared_len = latent_len - private_len
        self.pooling = pooling(self.shared_len + private_len * len(self.model_names), width) if latent_len else None
        self.project = nn.Linear(width, d_z)
        self.d_z = d_z

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Encode a batch of texts; return the latents for each model by name, (batch, latent_len, d_z).

        Args:
            ids: token ids of shape (batch, tokens).
            mask: a mask of shape (batch, tokens), True where there is text; each row has some.
        """
        if self.pooling is None:
            empty = self.project.weight.new_zeros(len(ids), 0, self.d_z)
            return {name: empty for name in self.model_names}
        x = self.features(ids, mask)
        x = x + positions(x.shape[1], x.shape[2], x.device)
        if self.layers is not None:
            x = self.layers(x, src_key_padding_mask=~mask)
        latents = self.project(self.pooling(self.norm(x), mask))
        shared, own = latents[:, : self.shared_len], latents[:, self.shared_len :]
        parts = own.split(self.private_len, dim=1) if self.private_len else [own] * len(self.model_names)
        return {name: torch.cat([shared, part], 1) for name, part in zip(self.model_names, parts, strict=True)}


class LearnedPrompt(nn.Module):
    """Learn latents that are the same for every text: Lester et al., The power of scale for prompt tuning, 2021.

    In the place of an encoder, it shows how much is gained by knowing the task without the text.

    Args:
        model_names: the names of the language models that the latents are for.
        latent_len: the number of latents that each model gets.
        d_z: the width of a latent.
    """

    def __init__(self, model_names: Sequence[str], latent_len: int, d_z: int) -> None:
        super().__init__()
        self.latent_len, self.d_z = latent_len, d_z
        self.z = nn.ParameterDict({name: nn.Parameter(torch.randn(latent_len, d_z)) for name in model_names})

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the latents for each model by name, (batch, latent_len, d_z); of the texts only the number matters."""
        return {name: z.expand(len(ids), -1, -1) for name, z in self.z.items()}
