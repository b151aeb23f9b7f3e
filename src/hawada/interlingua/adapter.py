"""From latents to what one language model reads: soft tokens, or keys and values for each of its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hawada.interlingua.llms.prefix import Prefix

SCALES = ("none", "embed_rms", "fixed", "train_stats")


class Scaling(nn.Module):
    """Brings the soft tokens of each example to a scale that the model knows.

    Args:
        mode: none; embed_rms: each example's root mean square becomes that of the model's embeddings; fixed: becomes
            `value`; train_stats: divided by the mean over what was seen in training, so that examples may differ.
        rms: of the model's embeddings.
        value: for `fixed`.

    Raises:
        ValueError: for another mode.
    """

    running: Tensor

    def __init__(self, mode: str, rms: float, value: float = 1.0) -> None:
        super().__init__()
        if mode not in SCALES:
            raise ValueError(f"interlingua.scale: {mode!r} is not one of {', '.join(SCALES)}")
        self.mode, self.rms, self.value = mode, rms, value
        self.register_buffer("running", torch.tensor(0.0))

    def forward(self, soft: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same shape."""
        if self.mode == "none" or not soft.shape[1]:
            return soft
        own = soft.float().square().mean((1, 2), keepdim=True).clamp_min(1e-12).sqrt()
        if self.mode != "train_stats":
            return soft * (self.rms if self.mode == "embed_rms" else self.value) / own
        if self.training:
            seen = own.detach().mean()
            seen = torch.where(seen.isfinite(), seen, self.running)
            self.running.copy_(torch.where(self.running > 0, 0.99 * self.running + 0.01 * seen, seen))
        return soft * self.rms / self.running.clamp_min(1e-12)


class LatentNetwork(nn.Module):
    """A two-layer network on each latent, told its place, and modulated by the mean of all latents.

    Perez et al., FiLM: visual reasoning with a general conditioning layer, 2018. It sees latents and nothing else: not
    the question, not the answer, not their lengths.

    Args:
        d_z: width of a latent.
        latents: how many.
        size: of what each becomes.
        hidden: width in between.
    """

    def __init__(self, d_z: int, latents: int, size: int, hidden: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(latents, d_z))
        self.enter, self.leave = nn.Linear(d_z, hidden), nn.Linear(hidden, size)
        self.film = nn.Linear(d_z, 2 * hidden)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, z: Tensor) -> Tensor:
        """(batch, latents, d_z) -> (batch, latents, size)."""
        scale, shift = self.film(z.mean(1, keepdim=True)).chunk(2, -1)
        x = torch.nn.functional.gelu(self.enter(z + self.place))
        return self.leave(x * (1 + scale) + shift)


class Adapter(nn.Module):
    """Latents as input embeddings.

    Args:
        d_z: width of a latent.
        latents: how many.
        width: of the model's embeddings.
        rms: of the model's embeddings, where soft tokens begin.
        hidden: width of the network.
        scale: see `Scaling`.
        value: of the scale `fixed`.
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
        self.scaling = Scaling(scale, rms, value)

    def forward(self, z: Tensor) -> Prefix:
        """(batch, latents, d_z) -> soft tokens (batch, latents, width)."""
        if not z.shape[1]:
            return Prefix()
        return Prefix(self.scaling(self.norm(self.network(z)) * self.scale))


class PrefixAdapter(nn.Module):
    """Latents as keys and values of every layer: Li and Liang, Prefix-tuning, 2021.

    Args:
        d_z: width of a latent.
        latents: how many.
        layers: of the model.
        kv_heads: of each.
        head_width: of each.
        hidden: width of the network.
    """

    def __init__(
        self, d_z: int, latents: int, layers: int, kv_heads: int, head_width: int, *, hidden: int = 256
    ) -> None:
        super().__init__()
        self.layers, self.kv_heads, self.head_width = layers, kv_heads, head_width
        self.network = LatentNetwork(d_z, latents, layers * 2 * kv_heads * head_width, hidden)

    def forward(self, z: Tensor) -> Prefix:
        """(batch, latents, d_z) -> keys and values of each layer, (batch, KV heads, latents, head width)."""
        batch, latents, _ = z.shape
        if not latents:
            return Prefix()
        both = self.network(z).view(batch, latents, self.layers, 2, self.kv_heads, self.head_width)
        both = both.permute(2, 3, 0, 4, 1, 5)  # (layers, 2, batch, KV heads, latents, head width)
        return Prefix(keys_values=tuple((keys, values) for keys, values in both))
