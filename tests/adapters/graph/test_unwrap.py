"""Models as people have them: wrapped, scripted, with tied tensors, or for other inputs than square images."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hawada
from hawada.adapters import Shape, save_model
from hawada.adapters.graph import GraphAdapter
from hawada.adapters.graph.unwrap import plain_model
from hawada.core.structure import keep_all, materialize


def small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3)).eval()


class Tied(nn.Module):
    """One module under two names, and two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.alias, self.one, self.other = self.body, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.other.weight = self.one.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alias(self.body(self.stem(x)).relu()).relu()
        return self.head((self.one(x) + self.other(x).relu()).mean((2, 3)))


def sequence(dims: int) -> nn.Sequential:
    conv, norm, pool = {
        1: (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d),
        2: (nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d),
        3: (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d),
    }[dims]
    return nn.Sequential(conv(3, 8, 3), norm(8), nn.ReLU(), conv(8, 4, 1), pool(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.fixture(autouse=True)
def own_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's package with models."""
    nets = types.ModuleType("theirnets")
    made = {
        "parallel": lambda: nn.DataParallel(small()),
        "compiled": lambda: torch.compile(small(), backend="eager"),
        "both": lambda: nn.DataParallel(torch.compile(small(), backend="eager")),
        "script": lambda: torch.jit.trace(small(), torch.randn(1, 3, 8, 8)),
        "normed": lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 8, 3)), *small()[3:]),
        "Tied": Tied,
        "sequence": sequence,
    }
    for name, function in made.items():
        function.__module__ = "theirnets"
        setattr(nets, name, function)
    monkeypatch.setitem(sys.modules, "theirnets", nets)


@pytest.mark.parametrize("name", ["parallel", "compiled", "both"])
def test_what_wraps_a_model_is_taken_off(name: str) -> None:
    adapter = GraphAdapter(factory=f"theirnets.{name}", image_size=8)
    model = adapter.skeleton()
    assert type(model) is nn.Sequential and list(model.state_dict()) == list(small().state_dict())
    assert [group.name for group in adapter.groups(model)] == ["0", "3"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("script", "it returns a TorchScript program; return the module that it was made of"),
        (
            "normed",
            r"0: torch\.nn\.utils\.weight_norm keeps a tensor that cannot be copied; use torch\.nn\.utils\.param",
        ),
    ],
)
def test_what_cannot_be_sliced_is_refused_with_what_helps(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GraphAdapter(factory=f"theirnets.{name}", image_size=8).skeleton()


def test_tied_tensors_are_saved_once_and_tied_again(tmp_path) -> None:
    adapter = GraphAdapter(factory="theirnets.Tied", image_size=8)
    torch.manual_seed(0)
    model = adapter.skeleton()
    groups = adapter.groups(model)
    keep = keep_all(groups) | {groups[0].name: (0, 2, 5)}
    slim = materialize(model, groups, keep).eval()
    spec = {"_target_": "hawada.adapters.graph.GraphAdapter", "factory": "theirnets.Tied", "image_size": 8}
    save_model(tmp_path / "m", slim, adapter=adapter, adapter_spec=spec, teacher=model, groups=groups, keep=keep)
    again = hawada.load(tmp_path / "m", trust=["theirnets."])
    x = adapter.example_inputs(Shape(2))
    assert torch.equal(again(*x), slim(*x))
    assert again.body is again.alias and again.one.weight is again.other.weight


@pytest.mark.parametrize(("dims", "size"), [(1, [20]), (2, [6, 10]), (3, [4, 6, 8]), (2, 8)])
def test_inputs_have_any_number_of_axes(dims: int, size: int | list[int]) -> None:
    adapter = GraphAdapter(factory="theirnets.sequence", arguments={"dims": dims}, image_size=size)
    assert [group.name for group in adapter.groups(adapter.skeleton())] == ["0", "3"]
    inner = (size, size) if isinstance(size, int) else tuple(size)
    assert adapter.example_inputs(Shape(2))[0].shape == (2, 3, *inner)


def test_a_network_of_streams_alone_names_the_option() -> None:
    adapter = GraphAdapter(arch="resnet18", image_size=32)
    model = nn.Sequential(Added(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"nothing can be pruned: .*; set model\.adapter\.stream=true"):
        adapter.groups(model)


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 8, size, padding=size // 2) for size in (1, 3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x) + self.three(x)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_nobody_knows_is_refused(kind: str) -> None:
    def doubled(module: nn.Module, args: Any, *output: Any) -> None:
        return None

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
    getattr(model[0], kind)(doubled)
    with pytest.raises(ValueError, match=r"0: nobody knows what its forward hook doubled does .*; remove the hook, or"):
        plain_model(model)
