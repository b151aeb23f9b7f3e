"""Whatever keeps its channels is listed: layer by layer, with the reason and what would free it."""

import sys
import types

import pytest
import torch
from torch import nn

from hawada.adapters.graph import GraphAdapter
from hawada.core.structure import KeptWhole, summarize_kept

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


class Tail(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.last = nn.Conv2d(width, 6, 1)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.relu(self.last(x)).mean((2, 3)))


class Sorted(nn.Module):
    """Sorts over channels, which nobody can follow."""

    def __init__(self):
        super().__init__()
        self.first, self.tail = nn.Conv2d(3, 8, 3), Tail(8)

    def forward(self, x):
        return self.tail(self.first(x).sort(dim=1).values)


class Numbered(nn.Module):
    """Has the number of its channels in its code."""

    def __init__(self):
        super().__init__()
        self.first, self.tail = nn.Conv2d(3, 8, 3), Tail(8)

    def forward(self, x):
        x = self.first(x)
        return self.tail(x.view(x.shape[0], 8, -1, 2).reshape(x.shape[0], 8, x.shape[2], x.shape[3]))


class Added(nn.Module):
    """Three layers add into the same channels."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 8, 1) for _ in range(3))
        self.tail = Tail(8)

    def forward(self, x):
        return self.tail(self.one(x) + self.two(x) + self.three(x))


class Padded(nn.Module):
    """Joins what a layer makes with channels that nothing makes."""

    def __init__(self):
        super().__init__()
        self.first, self.tail = nn.Conv2d(3, 6, 3), Tail(8)
        self.register_buffer("plane", torch.ones(1, 1, 1, 1))

    def forward(self, x):
        x = self.first(x)
        ones = self.plane.expand(x.shape[0], 6, x.shape[2], x.shape[3])
        return self.tail(torch.cat([x * ones.flip(1).cumsum(1), ones[:, :2]], 1))


class Recurrent(nn.Module):
    """Reads the columns of an image with an LSTM."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.lstm, self.out = nn.LSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True), nn.Linear(10, 3)

    def forward(self, x):
        columns = torch.relu(self.second(torch.relu(self.first(x)))).mean(2).transpose(1, 2)
        return self.out(self.lstm(columns)[0][:, -1])


@pytest.fixture(autouse=True)
def own_package(monkeypatch):
    nets = types.ModuleType("mynets")
    for made in (Sorted, Numbered, Added, Padded, Recurrent):
        monkeypatch.setattr(made, "__module__", "mynets")
        setattr(nets, made.__name__, made)
    monkeypatch.setitem(sys.modules, "mynets", nets)


def kept_of(**options):
    adapter = GraphAdapter(image_size=32, **options)
    with torch.device("meta"):
        model = adapter.skeleton()
    return adapter, model, {kept.module: kept for kept in adapter.kept_whole(model)}


@pytest.mark.parametrize(
    ("name", "module", "reason", "remedy"),
    [
        ("Sorted", "first", "sort in Sorted mixes channels", "declare its groups in an adapter of your own"),
        ("Numbered", "first", "view in Numbered has the number of channels written into code", "let the code take it"),
        ("Added", "two", "residual blocks add into", "set model.adapter.stream=true"),
    ],
)
def test_a_layer_is_listed_with_the_reason_and_the_remedy(name, module, reason, remedy):
    _, _, kept = kept_of(factory=f"mynets.{name}")
    assert kept[module].kind == "Conv2d" and kept[module].units == 8
    assert kept[module].reason == reason and kept[module].remedy.startswith(remedy)
    assert "tail.last" not in kept


def test_what_a_recurrent_layer_reads_stays_and_the_rest_goes():
    adapter, model, kept = kept_of(factory="mynets.Recurrent")
    assert kept["second"].reason == "LSTM in LSTM is not understood" and "first" not in kept
    assert [(group.name, group.units) for group in adapter.groups(model)] == [("first", 8)]


def test_the_outputs_of_a_model_are_listed_and_need_no_remedy():
    _, _, kept = kept_of(factory="mynets.Sorted")
    assert kept["tail.out"] == KeptWhole("tail.out", "Linear", 3, "are outputs of the model", "")


def test_the_remedy_frees_the_stream():
    _, _, kept = kept_of(factory="mynets.Added", stream=True)
    assert set(kept) == {"tail.out"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        *({"factory": f"mynets.{name}"} for name in ("Sorted", "Numbered", "Added", "Padded")),
        *({"arch": arch} for arch in ("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "resnet18")),
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_every_layer_is_in_a_group_or_listed(options, stream):
    try:
        adapter, model, kept = kept_of(**options, stream=stream)
    except ValueError as error:
        assert "nothing can be pruned" in str(error)
        return
    cut = {cut.module for group in adapter.groups(model) for cut in group.cuts if cut.dim == 0}
    layers = {path for path, module in model.named_modules() if isinstance(module, LAYERS)}
    assert layers <= cut | set(kept)
    for path in layers & cut & set(kept):  # some of its channels go
        assert 0 < kept[path].units < model.get_submodule(path).weight.shape[0]


def test_layers_are_summed_up_in_one_sentence_a_reason():
    kept = [
        KeptWhole("a", "Conv2d", 8, "residual blocks add into", "set x"),
        KeptWhole("b", "Linear", 2000, "view in Net has it", "write y"),
        KeptWhole("c", "Conv2d", 16, "residual blocks add into", "set x"),
        KeptWhole("d", "Linear", 3, "are outputs of the model", ""),
    ]
    assert summarize_kept(kept) == [
        "1 Linear layer keeps 2,000 channels, which view in Net has it; write y",
        "2 Conv2d layers keep 24 channels, which residual blocks add into; set x",
    ]
