"""Turn latents into what one language model reads: soft tokens, or keys and values for each of its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hawada.interlingua.llms.prefix import Prefix

SCALES = ("none", "embed_rms", "fixed", "train_stats")
MIN_SQUARE = 1e-12  # keeps the mean square of soft tokens, and their RMS, above zero in divisions


class Scale(nn.Module):
    """Bring the soft tokens of each example to a scale that the language model knows.

    Args:
        mode: how soft tokens are scaled. With none they stay as they are. With embed_rms, the root mean square (RMS)
            of each example becomes `rms`; with fixed, it becomes `value`. With train_stats, all examples are scaled
            by one factor, which brings the running mean of their RMS in training to `rms`, so that examples may
            differ from one another.
        rms: the RMS of the language model's embeddings.
        value: the RMS that the mode `fixed` gives.

    Attributes:
        running: the exponential moving average of the RMS over training batches; 0 before the first one.

    Raises:
        ValueError: when `mode` is not one of `SCALES`.
    """

    running: Tensor

    def __init__(self, mode: str, rms: float, value: float = 1.0) -> None:
        super().__init__()
        if mode not in SCALES:
            raise ValueError(f"interlingua.scale: {mode!r} is not one of {', '.join(SCALES)}; set it to one of them")
        self.mode, self.rms, self.value = mode, rms, value
        self.register_buffer("running", torch.tensor(0.0))

    def forward(self, soft: Tensor) -> Tensor:
        """Scale soft tokens of shape (batch, tokens, width); the shape stays."""
        if self.mode == "none" or not soft.shape[1]:
            return soft
        own = soft.float().square().mean((1, 2), keepdim=True).clamp_min(MIN_SQUARE).sqrt()
        if self.mode != "train_stats":
            return soft * (self.rms if self.mode == "embed_rms" else self.value) / own
        if self.training:
            batch_mean = own.detach().mean()
            batch_mean = torch.where(batch_mean.isfinite(), batch_mean, self.running)
            self.running.copy_(torch.where(self.running > 0, 0.99 * self.running + 0.01 * batch_mean, batch_mean))
        return soft * self.rms / self.running.clamp_min(MIN_SQUARE)


class LatentNetwork(nn.Module):
    """Apply a two-layer network to each latent, given its place and modulated by the mean of all latents.

    The modulation is that of Perez et al., FiLM: visual reasoning with a general conditioning layer, 2018. The network
    sees latents and nothing else: neither the question nor the answer nor the length of either.

    Args:
        d_z: the width of a latent.
        latents: the number of latents.
        size: the width of the output for each latent.
        hidden: the width between the two layers.
    """

    def __init__(self, d_z: int, latents: int, size: int, hidden: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(latents, d_z))
        self.enter, self.leave = nn.Linear(d_z, hidden), nn.Linear(hidden, size)
        self.film = nn.Linear(d_z, 2 * hidden)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents of shape (batch, latents, d_z) to (batch, latents, size)."""
        scale, shift = self.film(z.mean(1, keepdim=True)).chunk(2, -1)
        x = torch.nn.functional.gelu(self.enter(z + self.place))
        output: Tensor = self.leave(x * (1 + scale) + shift)
        return output


class Adapter(nn.Module):
    """Turn latents into input embeddings of one language model, its soft tokens.

    Args:
        d_z: the width of a latent.
        latents: the number of latents, and of soft tokens.
        width: the width of the language model's embeddings.
        rms: the root mean square of the language model's embeddings, at which soft tokens begin.
        hidden: the hidden width of the network.
        scale: how soft tokens are scaled, see `Scale`.
        value: the root mean square for the scale `fixed`.
    """

    def __init__(
        self,
        d_z: int,
        latents: int,
        width: int,
        rms: float,
        *,
        hidden: int = 256,
        scale: str = "embed_rms",
        value: float = 1.0,
    ) -> None:
        super().__init__()
        self.network = LatentNetwork(d_z, latents, width, hidden)
        self.norm = nn.RMSNorm(width, elementwise_affine=False)
        self.scale = nn.Parameter(torch.tensor(float(rms)), requires_grad=scale in ("none", "train_stats"))
        self.scaling = Scale(scale, rms, value)

    def forward(self, z: Tensor) -> Prefix:
        """Map latents of shape (batch, latents, d_z) to soft tokens of shape (batch, latents, width)."""
        if not z.shape[1]:
            return Prefix()
        return Prefix(self.scaling(self.norm(self.network(z)) * self.scale))


class PrefixAdapter(nn.Module):
    """Turn latents into keys and values of every layer: Li and Liang, Prefix-tuning, 2021.

    Args:
        d_z: the width of a latent.
        latents: the number of latents.
        layers: the number of the language model's layers.
        kv_heads: the number of key-value heads of each layer.
        head_width: the width of each head.
        hidden: the hidden width of the network.
    """

    def __init__(
        self, d_z: int, latents: int, layers: int, kv_heads: int, head_width: int, *, hidden: int = 256
    ) -> None:
        super().__init__()
        self.layers, self.kv_heads, self.head_width = layers, kv_heads, head_width
        self.network = LatentNetwork(d_z, latents, layers * 2 * kv_heads * head_width, hidden)

    def forward(self, z: Tensor) -> Prefix:
        """Map latents (batch, latents, d_z) to keys and values of each layer, (batch, heads, latents, head width)."""
        batch, latents, _ = z.shape
        if not latents:
            return Prefix()
        both = self.network(z).view(batch, latents, self.layers, 2, self.kv_heads, self.head_width)
        both = both.permute(2, 3, 0, 4, 1, 5)  # (layers, 2, batch, KV heads, latents, head width)
        return Prefix(keys_values=tuple((keys, values) for keys, values in both))
