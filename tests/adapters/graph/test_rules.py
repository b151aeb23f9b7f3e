"""Each kind of operator alone, and random networks made of them: what is gated to zero computes as what is cut off."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hawada.adapters.graph.declaration import Declaration
from hawada.adapters.graph.trace import trace
from hawada.adapters.graph.trial import declare
from hawada.core.gates import Student
from hawada.core.structure import materialize

CHANNELS, CLASSES = 8, 3


class Around(nn.Module):
    """A convolution, something that is looked at, and a head: x -> head(inner(conv(x)))."""

    def __init__(self, inner: nn.Module, channels: int = CHANNELS) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, CHANNELS, 3, padding=1), inner
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.conv(x)).mean((2, 3)))


class Function(nn.Module):
    """A function of the activation; its parameters, if it has any, are drawn at random."""

    def __init__(self, function, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters())


class HandwrittenNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * (x - mean) / torch.sqrt(variance + 1e-6) + self.bias[:, None, None]


class Attention(nn.Module):
    """Attention over positions, with the heads as an attribute and their size from the input."""

    def __init__(self, channels: int, heads: int, *, fused: bool, from_input: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused, self.from_input = heads, channels // heads, fused, from_input
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(batch, -1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        out = out.transpose(1, 2).reshape(batch, height * width, channels if self.from_input else -1)
        return self.proj(out).transpose(1, 2).reshape(batch, -1, height, width)


class Partial(nn.Module):
    """A convolution of some channels, whose numbers are attributes; the others pass."""

    def __init__(self, first: int, others: int) -> None:
        super().__init__()
        self.first, self.others, self.conv = first, others, nn.Conv2d(first, first, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one, other = torch.split(x, [self.first, self.others], dim=1)
        return torch.cat([self.conv(one), other], 1)


def shuffled(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def pooled(x: Tensor) -> Tensor:
    return F.avg_pool1d(x.permute(0, 2, 3, 1).flatten(0, 2), 2).repeat(1, 2)[:, :, None, None]


def halves(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return torch.cat([x[:, :half], x[:, half:].sigmoid()], 1)


PASSING = {
    "prelu": nn.PReLU(CHANNELS),
    "group norm": nn.GroupNorm(2, CHANNELS),
    "norm of every channel": nn.InstanceNorm2d(CHANNELS, affine=True),
    "norm by hand": HandwrittenNorm(CHANNELS),
    "transposed convolution": nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2),
    "depthwise": nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
    "channel shuffle": nn.ChannelShuffle(2),
    "channel shuffle by hand": Function(shuffled),
    "partial": Partial(2, CHANNELS - 2),
    "layer scale": Function(lambda x, scale: x * scale[:, None, None], scale=(CHANNELS,)),
    "bare addition": Function(lambda x, more: x + more, more=(1, CHANNELS, 1, 1)),
    "position embedding": Function(lambda x, more: x + more, more=(1, CHANNELS, 6, 6)),
    "chunks": Function(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "gated unit": Function(halves),
    "pixels": nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)),
    "softmax over positions": Function(lambda x: x * x.flatten(2).softmax(-1).view_as(x)),
    "einsum": Function(lambda x: torch.einsum("bchw->bhwc", x).permute(0, 3, 1, 2)),
    "flip and pad": Function(lambda x: F.pad(x.flip(1), (1, 1, 1, 1))),
    "interpolation": Function(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "stack": Function(lambda x: torch.stack([x, x.relu()], 1).amax(1)),
    "heads": Attention(CHANNELS, 4, fused=True, from_input=False),
    "heads by hand": Attention(CHANNELS, 4, fused=False, from_input=False),
}
STAYING = {
    "softmax over channels": (Function(lambda x: x.softmax(1)), "mixes channels"),
    "mean of channels": (Function(lambda x: x - x.mean(1, keepdim=True)), "sums over channels"),
    "sorted channels": (Function(lambda x: x.sort(1).values), "mixes channels"),
    "pooling over channels": (Function(pooled), "pools over channels"),
    "channels one by one": (Function(lambda x: torch.stack(x.unbind(1), 1)), "takes channels one by one"),
    "rolled channels": (Function(lambda x: x.roll(1, 1)), "picks channels by their numbers"),
    "every other channel": (Function(lambda x: x[:, ::2].repeat(1, 2, 1, 1)), "picks channels by their numbers"),
    "a constant for each": (
        Function(lambda x: x * torch.arange(CHANNELS)[:, None, None]),
        "joins channels with something that has none",
    ),
    "channels by channels": (
        Function(lambda x: ((x.flatten(2) @ x.flatten(2).mT).softmax(-1) @ x.flatten(2)).view_as(x)),
        "channels",
    ),
}


def declared(model: nn.Module, *, stream: bool = True) -> Declaration:
    return declare(trace(model, (torch.randn(2, 3, 6, 6),)), stream=stream)


EXACT = 1e-10


def differences(model: nn.Module, found: Declaration, seeds: int = 3) -> float:
    """The largest difference between the gated and the cut model in float64, relative to the largest output."""
    draw, worst, x = random.Random(0), 0.0, torch.randn(2, 3, 6, 6).double()
    model = model.double()
    with torch.no_grad(), Student(model, found.groups) as student:
        for _ in range(seeds):
            keep = {
                group.name: tuple(sorted(draw.sample(range(group.units), draw.randint(1, group.units))))
                for group in found.groups
            }
            slim = materialize(model, found.groups, keep).eval()
            with student.hard_gated(keep):
                gated = student(x)
            worst = max(worst, float((gated - slim(x)).abs().max() / gated.abs().max()))
    return worst


@pytest.mark.parametrize("name", PASSING)
def test_channels_go_through(name: str) -> None:
    torch.manual_seed(0)
    model = Around(PASSING[name]).eval()
    found = declared(model)
    assert any(cut.tensor == "conv.weight" and cut.dim == 0 for group in found.groups for cut in group.cuts)
    assert differences(model, found) < EXACT


@pytest.mark.parametrize("name", STAYING)
def test_channels_stay_where_fewer_would_mean_something_else(name: str) -> None:
    inner, reason = STAYING[name]
    with pytest.raises(ValueError, match=f"nothing can be pruned: .*{reason}"):
        declared(Around(inner).eval())


def test_heads_whose_number_is_written_into_code_go_with_the_channels_around() -> None:
    """The code gives the heads together as many channels as the input has, so both become fewer at once."""
    torch.manual_seed(0)
    attention = Attention(CHANNELS, 4, fused=True, from_input=True)
    model = Around(nn.Sequential(attention, nn.Conv2d(CHANNELS, CHANNELS, 1))).eval()
    found = declared(model)
    tied = next(group for group in found.groups if any(cut.tensor == "conv.weight" for cut in group.cuts))
    assert tied.units == 4 and {size.attribute for size in tied.sizes} >= {"inner.0.num_heads"}
    assert differences(model, found) < EXACT


class Proportional(nn.Module):
    """Code that treats a share of the channels otherwise, which fewer channels fit by chance."""

    def __init__(self, channels: int, share: float) -> None:
        super().__init__()
        self.conv, self.head, self.share = nn.Conv2d(3, channels, 3), nn.Linear(channels, CLASSES), share

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        first = int(x.shape[1] * self.share)
        return self.head(torch.cat([x[:, :first].sigmoid(), x[:, first:]], 1).mean((2, 3)))


class ReadLater(nn.Module):
    """A weight that reads what was made of the module's input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.sigmoid(), self.weight)


class Computed(ReadLater):
    """A weight that is computed, so that zero columns of the parameter are none of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.exp())


class Scaled(nn.Module):
    """A norm that knows how many channels there were."""

    def __init__(self, eps: float = 1e-6, scale: float = 1.0) -> None:
        super().__init__()
        self.weight, self.eps, self.scale = nn.Parameter(torch.rand(CHANNELS) + 0.5), eps, scale

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + self.eps).rsqrt() * self.weight[:, None, None] * self.scale


class Normalised(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.weight[:, None, None] * self.scale


class Twice(nn.Module):
    """A norm without parameters that is called on channels of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one = nn.GroupNorm(1, CHANNELS, affine=False), nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.one(self.norm(x).relu()))


class BareWeight(nn.Module):
    """Parameters of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(3, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.first).relu(), self.second).mean((2, 3))


class TwoRanks(nn.Module):
    """One layer that reads tensors with and without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, CHANNELS, 3), nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.head(tokens).mean(1) + self.head(tokens.amax(1))


MISLEADING = {
    "a quarter": lambda: Proportional(20, 0.25),
    "a third": lambda: Proportional(32, 1 / 3),
    "a scale by the width": lambda: Around(Function(lambda x: x * x.shape[1] ** -0.5)),
    "read later": lambda: Around(ReadLater()),
    "computed weight": lambda: Around(Computed()),
    "norm by length": lambda: Around(Normalised(scale=CHANNELS**0.5)),
    "norms with two eps": lambda: Around(nn.Sequential(Scaled(1e-6), nn.Conv2d(CHANNELS, CHANNELS, 1), Scaled(1.0))),
    "one norm twice": lambda: Around(Twice()),
    "one side of a matrix": lambda: Around(Function(lambda x: x.flatten(2).mT.triu().mT.view_as(x))),
    "bare weights": BareWeight,
    "two ranks": TwoRanks,
    "a branch padded with ones": lambda: Around(
        nn.Sequential(Padded(), nn.Conv2d(CHANNELS, CHANNELS, 1)),
    ),
}


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(CHANNELS, CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.pad(self.one(x), (1, 1, 1, 1), value=1.0)


@pytest.mark.parametrize("name", MISLEADING)
def test_what_looks_as_if_it_could_go_is_exact_or_stays(name: str) -> None:
    torch.manual_seed(0)
    model = MISLEADING[name]().eval()
    try:
        found = declared(model)
    except ValueError as error:
        assert "nothing can be pruned" in str(error)
        return
    assert differences(model, found, seeds=6) < EXACT


def test_a_pass_leaves_the_model_as_it_was() -> None:
    model = Around(nn.BatchNorm2d(CHANNELS)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    declared(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


LAYERS = {
    "convolution": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
    "grouped": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2),
    "batch norm": lambda: nn.BatchNorm2d(CHANNELS),
    "group norm": lambda: nn.GroupNorm(2, CHANNELS),
    "shuffle": lambda: nn.ChannelShuffle(2),
    "silu": nn.SiLU,
    "partial": lambda: Partial(2, CHANNELS - 2),
    "heads": lambda: Attention(CHANNELS, 4, fused=True, from_input=False),
    "residual": lambda: Residual(nn.Conv2d(CHANNELS, CHANNELS, 1)),
    "halves": lambda: Function(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
}


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5), st.booleans())
def test_random_networks_are_exact(names: list[str], stream: bool) -> None:
    torch.manual_seed(0)
    last = nn.Conv2d(CHANNELS, CHANNELS, 1)  # so that there is a group whatever the layers are
    model = Around(nn.Sequential(*(LAYERS[name]() for name in names), last)).eval()
    assert differences(model, declared(model, stream=stream)) < EXACT
