"""A toy residual network with everything an adapter declares, and a proxy whose milliseconds are known by hand."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from hawada.core.latency import LatencyTable
from hawada.core.latency.proxy import Term
from hawada.core.latency.site_table import SiteTable
from hawada.core.structure import Cut, GatePoint, Group, Removal, Site


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing from threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    def __init__(self, features=5, hidden=8):
        super().__init__()
        self.up = nn.Linear(features, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.down = nn.Linear(hidden, features)

    def forward(self, x):
        return x + self.down(torch.relu(self.norm(self.up(x))))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 5)
        self.first = Block()
        self.second = Block()
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x))))


class LinearProxy:
    """1 ms + 0.5 ms for every hidden unit whose branch stays: 9 ms for the full toy."""

    def __init__(self, overhead=1.0, each=0.5):
        self.overhead, self.each = overhead, each
        self.samples = []

    def predict(self, widths):
        total = torch.tensor(self.overhead, dtype=torch.float64)
        for path in ("first", "second"):
            branch = torch.as_tensor(widths[f"{path}.branch"]).double()
            total = total + self.each * branch * torch.as_tensor(widths[f"{path}.hidden"]).double()
        return total

    def terms(self):
        inside = [
            Term((f"{path}.branch", f"{path}.hidden"), lambda branch, hidden: self.each * branch * hidden)
            for path in ("first", "second")
        ]
        return [Term((), lambda: self.overhead), *inside]

    def add_sample(self, widths, ms, weight=1.0):
        self.samples.append((dict(widths), ms, weight))


def block_groups(path):
    return [
        Group(f"{path}.branch", "branch", 1, (GatePoint(f"{path}.down", dim=-1),), removes=(Removal(path),)),
        Group(
            f"{path}.hidden",
            "channel",
            8,
            (GatePoint(f"{path}.down", side="input", dim=-1),),
            cuts=(
                Cut(f"{path}.up.weight", 0, follows="out_features"),
                Cut(f"{path}.up.bias", 0),
                *(Cut(f"{path}.norm.{name}", 0) for name in ("weight", "bias", "running_mean")),
                Cut(f"{path}.norm.running_var", 0, follows="num_features"),
                Cut(f"{path}.down.weight", 1, follows="in_features"),
            ),
            parent=f"{path}.branch",
        ),
    ]


@pytest.fixture
def groups():
    return block_groups("first") + block_groups("second")


@pytest.fixture
def layers():
    """Four layers of four KV heads with two query heads each, and eight FFN neurons: a declaration without a model."""
    return [
        group
        for path in (f"layers.{index}" for index in range(4))
        for group in (
            Group(path, "layer", 1, (), removes=(Removal(path),)),
            Group(f"{path}.kv", "kv", 4, (), parent=path),
            Group(f"{path}.query", "query", 8, (), parent=f"{path}.kv", equal_per_parent=2),
            Group(f"{path}.ffn", "ffn", 8, (), parent=path),
        )
    ]


@pytest.fixture
def sites():
    return [Site(path, (f"{path}.branch", f"{path}.hidden"), "block") for path in ("first", "second")]


@pytest.fixture
def toy():
    """In eval mode, with random norms: fresh ones would hide a gate on the wrong side of them."""
    torch.manual_seed(0)
    model = Toy().eval()
    for block in (model.first, model.second):
        nn.init.uniform_(block.norm.weight, 0.5, 1.5)
        nn.init.normal_(block.norm.bias)
        block.norm.running_mean.normal_()
        block.norm.running_var.uniform_(0.5, 2.0)
    return model


@pytest.fixture
def inputs():
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def linear_proxy():
    return LinearProxy


@pytest.fixture
def hand_table():
    """a: 10 ms at 4 units, 20 ms at 8; b: 1 ms without its branch, else 3, 5 or 9 ms at 2, 4 or 6 units."""
    return LatencyTable(
        [
            SiteTable(Site("a", ("wide",), "early"), ((4, 8),), np.array([10.0, 20.0])),
            SiteTable(
                Site("b", ("branch", "inner"), "late"),
                ((0, 1), (2, 4, 6)),
                np.array([[1.0, 1.0, 1.0], [3.0, 5.0, 9.0]]),
            ),
        ]
    )


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
