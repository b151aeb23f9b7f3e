"""Networks that take several tensors, dictionaries or keywords, and that return more than one."""

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hawada
from hawada.adapters import Shape, save_model
from hawada.adapters.graph import GraphAdapter
from hawada.adapters.graph.example import example_tensors, names_of
from hawada.core.evaluate import compare_outputs
from hawada.core.gates import Student
from hawada.core.structure import TensorRow, keep_first, materialize


def encoder(channels):
    return nn.Sequential(
        nn.Conv2d(channels, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.fc = encoder(3), nn.Linear(32, 2)

    def forward(self, x, y):
        return self.fc(torch.cat([self.enc(x), self.enc(y)], 1))


class Nested(nn.Module):
    """Takes a dictionary in which there is a list, and returns one with a tuple."""

    def __init__(self):
        super().__init__()
        self.enc, self.one, self.two = encoder(3), nn.Linear(16, 3), nn.Linear(16, 5)

    def forward(self, batch):
        first, second = batch["images"]
        features = self.enc(first) + self.enc(second) * batch["scale"][:, :1]
        return {"classes": self.one(features), "more": (self.two(features), first.mean((1, 2, 3)))}


class Keywords(nn.Module):
    """Takes an image and a table by name alone, and a mask that it can do without."""

    def __init__(self):
        super().__init__()
        self.enc, self.table, self.fc = encoder(3), nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, *, image, table, mask=None):
        features = self.enc(image) * torch.sigmoid(self.table(table))
        return self.fc(features if mask is None else features * mask)


class Tokens(nn.Module):
    """Takes whole numbers beside an image."""

    def __init__(self):
        super().__init__()
        self.enc, self.words, self.fc = encoder(1), nn.Embedding(50, 16), nn.Linear(16, 4)

    def forward(self, image, words):
        return self.fc(F.relu(self.enc(image) + self.words(words).mean(1)))


def batch_of_two(batch):
    return {"batch": {"images": [torch.randn(batch, 3, 16, 16) for _ in range(2)], "scale": torch.randn(batch, 1)}}


EXAMPLES = {
    "Siamese": [[3, 16, 16], [3, 16, 16]],
    "Nested": {"batch": {"images": [[3, 16, 24], [3, 16, 24]], "scale": [1]}},
    "Keywords": {"image": [3, 16, 16], "table": [6]},
    "Tokens": {"image": [1, 16, 16], "words": {"shape": [7], "dtype": "int64", "high": 50}},
}


@pytest.fixture(autouse=True)
def own_package(monkeypatch):
    nets = types.ModuleType("mynets")
    for made in (Siamese, Nested, Keywords, Tokens, batch_of_two):
        monkeypatch.setattr(made, "__module__", "mynets")
        setattr(nets, made.__name__, made)
    monkeypatch.setitem(sys.modules, "mynets", nets)


def build(name, example):
    torch.manual_seed(0)
    adapter = GraphAdapter(factory=f"mynets.{name}", example=example, stream=True)
    model = adapter.skeleton()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias)
    return adapter, model


@pytest.mark.parametrize(("name", "example"), [*EXAMPLES.items(), ("Nested", "mynets.batch_of_two")])
def test_gated_equals_sliced_whatever_goes_in_and_out(tmp_path, name, example):
    adapter, model = build(name, example)
    inputs = adapter.example_inputs(Shape(3))
    assert all(len(tensor) == 3 for tensor in inputs)
    groups = adapter.groups(model)
    assert sum(group.units for group in groups) >= 12 + 16, adapter.kept_whole(model)
    keep = keep_first(groups, {group.name: group.units // 2 for group in groups})
    slim = materialize(model, groups, keep)
    with torch.no_grad(), Student(copy.deepcopy(model), groups) as student, student.hard_gated(keep):
        found = compare_outputs(student(*inputs), slim(*inputs))
    assert found["max_abs_diff"] <= 1e-5 * found["max_abs_logit"]
    spec = {
        "_target_": "hawada.adapters.graph.GraphAdapter", "factory": f"mynets.{name}", "example": example
    }  # fmt: skip
    save_model(tmp_path / "m", slim, adapter=adapter, adapter_spec=spec, teacher=model, groups=groups, keep=keep)
    loaded = hawada.load(tmp_path / "m", trust=["mynets."])
    assert torch.equal(adapter.logits(loaded(*inputs)), adapter.logits(slim(*inputs)))


def test_a_row_of_tensors_and_the_models_own_arguments_are_the_same_call():
    adapter, model = build("Keywords", EXAMPLES["Keywords"])
    image, table = adapter.example_inputs(Shape(2))
    expected = model(image=image, table=table)
    assert torch.equal(model(image, table), expected) and torch.equal(model(TensorRow([image, table])), expected)
    assert model.state_dict().keys() == Keywords().state_dict().keys()


def test_a_model_that_others_made_is_read_without_being_changed():
    adapter, _ = build("Nested", EXAMPLES["Nested"])
    own = Nested().eval()
    assert adapter.groups(own) == adapter.groups(adapter.skeleton()) and not own._forward_pre_hooks


def test_all_outputs_are_one_row_for_comparing():
    adapter, model = build("Nested", EXAMPLES["Nested"])
    assert adapter.logits(model(*adapter.example_inputs(Shape(4)))).shape == (4, 3 + 5 + 1)


def test_the_same_example_is_made_every_time():
    first, again = (example_tensors(EXAMPLES["Tokens"], 5) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert first[1].dtype == torch.int64 and int(first[1].min()) >= 0 and int(first[1].max()) < 50
    assert names_of(EXAMPLES["Tokens"]) == ["image", "words"] and names_of(EXAMPLES["Siamese"]) == []
    assert names_of({"batch": {"image": [3, 8, 8]}}) == ["image"]


@pytest.mark.parametrize("name", ["Siamese", "Nested", "Keywords", "Tokens"])
def test_a_network_that_takes_something_else_is_refused_with_what_helps(name):
    adapter = GraphAdapter(factory=f"mynets.{name}", image_size=16, channels=1 if name == "Tokens" else 3)
    with pytest.raises(ValueError, match=rf"{name}: the forward pass fails .*; set model\.adapter\.example to what"):
        adapter.groups(adapter.skeleton())


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("mynets.nothing", r"mynets\.nothing cannot be imported and called"),
        ({"x": "mynets.batch_of_two"}, r"mynets\.batch_of_two stands where a shape is expected"),
        ({"x": {"shape": [3], "dtype": "int65"}}, r"int65 is no dtype; int64 is one"),
        ([], r"does not make tensors|set model\.adapter\.example"),
    ],
)
def test_an_example_that_makes_no_tensors_is_refused(example, message):
    adapter = GraphAdapter(factory="mynets.Siamese", example=example)
    with pytest.raises(ValueError, match=message):
        adapter.groups(adapter.skeleton())
