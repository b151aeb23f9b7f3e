"""A text as a few latents that every model's adapter can read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hawada.interlingua.llms.tokenizers import ByteTokenizer

PoolingFactory = Callable[[int, int], nn.Module]


class ByteFeatures(nn.Module):
    """Learned embeddings of bytes.

    Args:
        width: of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(ByteTokenizer.vocabulary, width)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, tokens, width)."""
        return self.table(ids)


class FrozenFeatures(nn.Module):
    """What a frozen language model makes of the text, projected: its input embeddings, or the states of a layer.

    The model is no part of this module's state.

    Args:
        read: (ids, mask), both (batch, tokens) -> features (batch, tokens, size), without gradient.
        size: of what it returns.
        width: of the features.
    """

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor], size: int, width: int) -> None:
        super().__init__()
        self.read = read
        self.norm = nn.LayerNorm(size)
        self.project = nn.Linear(size, width)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, tokens, width)."""
        with torch.no_grad():
            features = self.read(ids, mask)
        return self.project(self.norm(features.float()))


def positions(count: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of the position, (count, width); Vaswani et al., Attention is all you need, 2017."""
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    angle = torch.arange(count, device=device)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


class InterlinguaEncoder(nn.Module):
    """Features, a transformer over them, pooling, and a projection to latents of width `d_z`.

    Some latents are shared by all readers, others, where asked for, belong to one.

    Args:
        features: (ids, mask) -> (batch, tokens, width).
        pooling: (latents, width) -> a module, see `hawada.interlingua.pooling`.
        readers: names of the models that read latents.
        latent_len: latents that each reader gets.
        private_len: how many of these are its own.
        d_z: width of a latent.
        width: of the features.
        layers: of the transformer; 0 for none.
        heads: of its attention.

    Raises:
        ValueError: when more latents are private than there are.
    """

    def __init__(
        self,
        features: nn.Module,
        pooling: PoolingFactory,
        readers: Sequence[str],
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
                f"interlingua.private_len: {private_len} is not between 0 and interlingua.latent_len={latent_len}"
            )
        self.readers, self.latent_len, self.private_len = tuple(readers), latent_len, private_len
        self.features = features
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False) if layers else None
        self.norm = nn.LayerNorm(width)
        self.shared_len = latent_len - private_len
        self.pooling = pooling(self.shared_len + private_len * len(self.readers), width) if latent_len else None
        self.project = nn.Linear(width, d_z)
        self.d_z = d_z

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Latents of each reader, (batch, latent_len, d_z).

        Args:
            ids: (batch, tokens).
            mask: (batch, tokens), True where there is text; each row has some.
        """
        if self.pooling is None:
            empty = self.project.weight.new_zeros(len(ids), 0, self.d_z)
            return {name: empty for name in self.readers}
        x = self.features(ids, mask)
        x = x + positions(x.shape[1], x.shape[2], x.device)
        if self.layers is not None:
            x = self.layers(x, src_key_padding_mask=~mask)
        latents = self.project(self.pooling(self.norm(x), mask))
        shared, own = latents[:, : self.shared_len], latents[:, self.shared_len :]
        parts = own.split(self.private_len, dim=1) if self.private_len else [own] * len(self.readers)
        return {name: torch.cat([shared, part], 1) for name, part in zip(self.readers, parts, strict=True)}


class LearnedPrompt(nn.Module):
    """Latents that are the same whatever the text is: Lester et al., The power of scale for prompt tuning, 2021.

    In an encoder's place it tells what is gained by knowing the task alone.

    Args:
        readers: names of the models that read latents.
        latent_len: latents that each reader gets.
        d_z: width of a latent.
    """

    def __init__(self, readers: Sequence[str], latent_len: int, d_z: int) -> None:
        super().__init__()
        self.latent_len, self.d_z = latent_len, d_z
        self.z = nn.ParameterDict({name: nn.Parameter(torch.randn(latent_len, d_z)) for name in readers})

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """(batch, tokens) twice -> latents of each reader, (batch, latent_len, d_z)."""
        return {name: z.expand(len(ids), -1, -1) for name, z in self.z.items()}
