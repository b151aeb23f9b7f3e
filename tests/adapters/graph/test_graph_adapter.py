"""The graph adapter finds groups that are exact on many families and equal to those declared by hand on ResNets."""

import json
import random
import sys
import types
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
import torchvision
from adapters.resnet_by_hand import groups_by_hand, sites_by_hand
from safetensors.torch import save_file
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import _efficientnet_conf
from torchvision.models.regnet import BlockParams

import hawada
from hawada.adapters import Shape, load_model, save_model
from hawada.adapters.base import MANIFEST
from hawada.adapters.graph import GraphAdapter
from hawada.core.evaluate import compare_outputs
from hawada.core.gates import Student
from hawada.core.latency import Rounds, SimulatedClock, build_table
from hawada.core.structure import ExportPolicy, check_groups, keep_all, keep_first, materialize, widths_of


class Shortcut(nn.Module):
    """Option A of He et al., 2015: it subsamples, and pads with channels whose number is written into code."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class CifarBlock(nn.Module):
    def __init__(self, channels, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1:
            pad = (0, 0, 0, 0, planes // 4, planes // 4)
            self.shortcut = Shortcut(lambda x: F.pad(x[:, :, ::2, ::2], pad, "constant", 0))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """ResNet-20 for CIFAR, in the layout that its best-known checkpoints have."""

    def __init__(self, blocks=3, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (channels, planes) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
            layers = [CifarBlock(channels, planes, 1 if stage == 1 else 2)]
            layers += [CifarBlock(planes, planes, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


def resnet(block="BasicBlock", layers=(2, 1, 1, 1), **options):
    """A ResNet or ResNeXt, whose blocks alone differ from those of torchvision's in number."""
    return torchvision.models.resnet.ResNet(getattr(torchvision.models.resnet, block), list(layers), **options)


def regnet(depth=8, se_ratio=0.25, num_classes=5):
    """RegNetY-400MF (Radosavovic et al., Designing Network Design Spaces, 2020) with half of its blocks."""
    settings = BlockParams.from_init_params(depth, w_0=48, w_a=55, w_m=2.09, group_width=8, se_ratio=se_ratio)
    return torchvision.models.RegNet(settings, num_classes=num_classes)


def efficientnet(depth=0.5, num_classes=5):
    """EfficientNet-B0 with fewer blocks."""
    settings, last = _efficientnet_conf("efficientnet_b0", width_mult=1.0, depth_mult=depth)
    return torchvision.models.EfficientNet(settings, 0.2, num_classes=num_classes, last_channel=last)


def convnext(num_classes=5):
    """ConvNeXt with one or two blocks in each stage."""
    sizes = [(96, 192, 1), (192, 384, 1), (384, 768, 2), (768, None, 1)]
    return torchvision.models.ConvNeXt([CNBlockConfig(*size) for size in sizes], num_classes=num_classes)


FEWER_BLOCKS = {"inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2], [6, 64, 1, 2]]}
DENSENET = {"growth_rate": 32, "block_config": [6, 8], "num_init_features": 64}


def body(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.fixture(autouse=True)
def own_package(monkeypatch):
    """Install a user's package with models."""
    nets = types.ModuleType("mynets")
    for cls in (CifarResNet, *WRITTEN_HERE):
        monkeypatch.setattr(cls, "__module__", "mynets")
        setattr(nets, cls.__name__, cls)
    for build in (resnet, regnet, efficientnet, convnext):
        monkeypatch.setattr(build, "__module__", "mynets")
        setattr(nets, build.__name__, build)
    nets.torch = torch
    monkeypatch.setitem(sys.modules, "mynets", nets)


def randomised(model):
    """Fill a skeleton with random values; fresh norms would hide a gate on the wrong side."""
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 20, generator=generator)  # repeated where a tensor is larger, because drawing takes long

    def fill(tensor, scale):
        repeats = -(-tensor.numel() // len(noise))
        tensor.data.copy_(
            (noise.repeat(repeats) if repeats > 1 else noise)[: tensor.numel()].view(tensor.shape) * scale
        )
        noise.copy_(noise.roll(1))

    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            fill(tensor, 1.5 * tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.3)
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator)
            fill(module.running_mean, 0.3)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.num_batches_tracked.zero_()
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
    return model.eval()


def build(arch=None, size=32, **options):
    adapter = GraphAdapter(arch, image_size=size, **options)
    with torch.device("meta"):
        model = adapter.skeleton()
    return adapter, randomised(model)


def hard_gated_equals_sliced(adapter, model, random_units, seeds=2):
    """Compare both for random kept units; return the groups and the branches that were removed at least once."""
    groups, inputs = adapter.groups(model), adapter.example_inputs(Shape(2))
    check_groups(groups, model)
    student, removed = Student(model, groups), set()
    for seed in range(seeds):
        keep = random_units(groups, seed)
        removed |= {group.name for group in groups if group.removes and not keep[group.name]}
        slim = materialize(student.model, groups, keep)
        with torch.no_grad(), student.hard_gated(keep):
            found = compare_outputs(student(*inputs), slim(*inputs))
        assert found["max_abs_logit"] > 1e-3
        assert found["max_abs_diff"] <= 1e-5 * found["max_abs_logit"]
    student.detach()
    return groups, removed


# Each network has its options and the number of groups of each kind.
NETS = {
    "resnet18": ({"arch": "resnet18"}, {"branch": 8, "channel": 8, "stream": 4}),
    "resnext": (
        {"factory": "mynets.resnet", "arguments": {"block": "Bottleneck", "groups": 32, "width_per_group": 4}},
        {"branch": 5, "grouped": 10, "stream": 5},
    ),
    "mobilenet_v2": ({"arch": "mobilenet_v2", "arguments": FEWER_BLOCKS}, {"branch": 2, "channel": 9, "stream": 2}),
    "mobilenet_v3_small": ({"arch": "mobilenet_v3_small"}, {"branch": 6, "channel": 22, "ffn": 1, "stream": 4}),
    "vgg11_bn": ({"arch": "vgg11_bn"}, {"channel": 8, "ffn": 2}),
    "regnet": ({"factory": "mynets.regnet"}, {"branch": 8, "channel": 8, "grouped": 16, "stream": 5}),
    "efficientnet": ({"factory": "mynets.efficientnet"}, {"branch": 3, "channel": 25, "stream": 3}),
    "densenet": ({"factory": "torchvision.models.DenseNet", "arguments": DENSENET}, {"channel": 18}),
    "squeezenet1_1": ({"arch": "squeezenet1_1"}, {"channel": 25}),
    "googlenet": ({"arch": "googlenet"}, {"channel": 57}),
    "shufflenet_v2": (
        {
            "factory": "torchvision.models.ShuffleNetV2",
            "arguments": {"stages_repeats": [2, 3, 2], "stages_out_channels": [24, 48, 96, 192, 256]},
        },
        {"channel": 9, "grouped": 3},
    ),
    "convnext": ({"factory": "mynets.convnext"}, {"branch": 5, "ffn": 5, "stream": 4}),
}


@pytest.mark.parametrize("name", NETS)
def test_hard_gated_equals_sliced(name, random_units):
    options, kinds = NETS[name]
    adapter, model = build(num_classes=5, stream=True, **options)
    groups, removed = hard_gated_equals_sliced(adapter, model, random_units)
    found = [group.kind for group in groups]
    assert {kind: found.count(kind) for kind in sorted(set(found))} == kinds
    assert not kinds.get("branch") or removed
    touched = {name for site in adapter.sites(model) for name in site.groups}
    assert touched == {group.name for group in groups}  # otherwise the proxy would not see the time that a group saves
    plain = GraphAdapter(image_size=32, num_classes=5, **options).groups(model)
    assert plain == [group for group in groups if group.kind != "stream"]


def test_an_option_a_network_keeps_its_streams(random_units):
    adapter, model = build(factory="mynets.CifarResNet")
    groups, removed = hard_gated_equals_sliced(adapter, model, random_units, seeds=10)
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    assert [group.name for group in groups] == [f"{block}.{part}" for block in blocks for part in ("branch", "conv1")]
    assert removed == {f"{block}.branch" for block in blocks}
    keeps = {group.name: group.removes[0].keeps for group in groups if group.removes}
    assert keeps["layer1.0.branch"] == () and keeps["layer2.0.branch"] == ("shortcut",)


def normalised(groups):
    """Return the groups with their cuts and gate points in one order."""
    return [replace(g, cuts=sorted(g.cuts, key=str), gated_at=sorted(g.gated_at, key=str)) for g in groups]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_groups_and_sites_of_a_resnet_are_those_declared_by_hand(block, stream):
    arguments = {"block": block, "layers": [2, 2, 2, 2]}
    adapter = GraphAdapter(factory="mynets.resnet", arguments=arguments, image_size=64, stream=stream)
    with torch.device("meta"):
        model = adapter.skeleton()
    declared = groups_by_hand(model, stream=stream)
    assert normalised(adapter.groups(model)) == normalised(declared)
    assert adapter.sites(model) == sites_by_hand(model, stream=stream)
    keep = keep_all(declared) | {"layer1.1.branch": (), "layer2.0.branch": ()}
    slim = materialize(model, declared, keep)
    assert normalised(adapter.groups(slim)) == normalised(groups_by_hand(slim, stream=stream))


@pytest.mark.parametrize("name", ["resnet18", "legacy_seresnet18", "resnet26t"])
def test_timms_resnets(name, random_units):
    pytest.importorskip("timm")
    adapter, model = build(factory="timm.create_model", arguments={"model_name": name}, num_classes=5, stream=True)
    groups, _ = hard_gated_equals_sliced(adapter, model, random_units)
    assert {"branch", "channel", "stream"} == {group.kind for group in groups}


@pytest.mark.parametrize(("arch", "arguments"), [("mobilenet_v2", FEWER_BLOCKS), ("squeezenet1_1", {})])
def test_a_slim_network_can_be_pruned_again(arch, arguments, random_units):
    adapter, model = build(arch, arguments=arguments, num_classes=5, stream=True)
    groups = adapter.groups(model)
    slim = materialize(model, groups, random_units(groups, 1))
    fewer, _ = hard_gated_equals_sliced(adapter, slim, random_units)
    assert sum(group.units for group in fewer) < sum(group.units for group in groups)


@pytest.mark.parametrize(
    ("arch", "arguments", "last"),
    [("mobilenet_v2", FEWER_BLOCKS, "features.7"), ("vgg11_bn", {}, "features.18")],
)
def test_the_sites_add_up(arch, arguments, last):
    """On a device whose operators add up, the time outside the sites does not change with the widths."""
    adapter = GraphAdapter(arch, arguments=arguments, image_size=32, num_classes=5)
    with torch.device("meta"):
        model = adapter.skeleton()
    groups, inputs = adapter.groups(model), adapter.example_inputs(Shape(2))
    groups = [
        group for group in groups if not group.name.startswith(last)
    ]  # a function consumes these channels, and functions are no sites
    sites = [
        replace(s, groups=tuple(n for n in s.groups if n in {g.name for g in groups})) for s in adapter.sites(model)
    ]
    sites = [replace(s, reads=s.reads if s.reads in s.groups else None) for s in sites if s.groups]
    clock, rounds = SimulatedClock(tile=1), Rounds(min_rounds=1, max_rounds=1)
    calls = [(1, model, tuple(x.to("meta") for x in inputs))]
    table = build_table(model, groups, sites, calls, clock, policy=ExportPolicy(), points=3, rounds=rounds)
    grids = {name: grid for entry in table.sites for name, grid in zip(entry.site.groups, entry.grid, strict=True)}
    draw, rests = random.Random(0), []
    for _ in range(4):
        keep = keep_first(groups, {name: draw.choice(grid) for name, grid in grids.items()})
        whole = clock.prepare(materialize(model, groups, keep), inputs)()
        rests.append(whole - sum(float(entry.interpolate(widths_of(keep, groups))) for entry in table.sites))
    assert max(rests) - min(rests) < 1e-6


def test_a_concatenation_is_read_at_its_offsets():
    adapter, model = build("squeezenet1_1")
    reading = next(site for site in adapter.sites(model) if site.module == "features.4.squeeze")
    assert reading.reads == ("features.3.expand1x1", "features.3.expand3x3")
    cuts = {cut for group in adapter.groups(model) for cut in group.cuts if cut.tensor == "features.4.squeeze.weight"}
    assert {(cut.dim, cut.offsets) for cut in cuts} == {(0, (0,)), (1, (0,)), (1, (64,))}


def test_a_dense_block_shares_its_units_among_its_layers():
    adapter = GraphAdapter(factory="torchvision.models.DenseNet", arguments=DENSENET, image_size=32)
    with torch.device("meta"):
        model = adapter.skeleton()
    groups = {group.name: group for group in adapter.groups(model)}
    shared = groups["features.denseblock1.denselayer1.conv2"]
    assert shared.units == 32 and {cut.tensor for cut in shared.cuts if cut.tensor.endswith("conv2.weight")} == {
        f"features.denseblock1.denselayer{layer}.conv2.weight" for layer in range(1, 7)
    }
    assert max(len(site.groups) for site in adapter.sites(model)) <= 3


class Shared(nn.Module):
    """A network that calls one convolution twice and uses the weight of another directly."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.middle, self.taken, self.last = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = body()

    def forward(self, x):
        x = torch.sigmoid(self.again(self.again(self.first(x))))
        return self.head(self.last(self.taken(self.middle(x)) * torch.flatten(self.taken.weight, 1).mean()))


class Squeezed(nn.Module):
    """A network with two sigmoids, a squeeze-and-excite branch, a grouped convolution and a flattened output."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.last, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8 * 16, 3)

    def forward(self, x):
        x = torch.sigmoid(self.norm(self.stem(x)))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = torch.cat([self.deep(x), x * scale.unsqueeze(-1).unsqueeze(-1)], dim=1)
        return self.head(F.adaptive_avg_pool2d(self.last(x), 4).flatten(1))


class Reparametrised(nn.Module):
    """A network with a computed weight and a block that is called with more than its input."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.block, self.head = Scaled(), body()

    def forward(self, x):
        return self.head(self.block(self.first(x), scale=1.0))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.act, self.two = nn.Conv2d(8, 6, 1), nn.GELU(), nn.Conv2d(6, 8, 1)

    def forward(self, x, scale):
        return x + scale * self.two(self.act(self.one(x)))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), body()

    def forward(self, x):
        x = self.conv(x)
        return self.head(x if x.mean() > 0 else -x)


class Shuffled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.shuffle, self.head = nn.Conv2d(3, 8, 3), nn.ChannelShuffle(2), body()

    def forward(self, x):
        return self.head(self.shuffle(self.conv(x)))


class Sorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)).sort(-1).values)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), body()

    def forward(self, x):
        return str(self.head(self.conv(x)).shape)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = body(nn.Conv2d(3, 8, 3))

    def forward(self, x):
        return self.body(x)


WRITTEN_HERE = (Shared, Squeezed, Reparametrised, Branching, Shuffled, Sorted, Several, Plain)


@pytest.mark.parametrize("name", ["Shared", "Squeezed", "Reparametrised", "Shuffled"])
def test_unusual_networks(name, random_units):
    adapter, model = build(factory=f"mynets.{name}", size=16, stream=True)
    groups, _ = hard_gated_equals_sliced(adapter, model, random_units, seeds=6)
    names = {group.name for group in groups}
    expected = {
        "Squeezed": {"stem", "squeeze", "deep", "last"},
        "Reparametrised": {"block.branch", "block.one"},
        "Shuffled": {"conv"},
    }
    assert names == expected.get(name, {"first", "last"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factory": "mynets.Branching"}, r"Branching: Branching\.forward \(line \d+\) depends on the values of "),
        ({"factory": "mynets.Sorted"}, r"Sorted: nothing can be pruned: the model \(sort\) mixes channels; "),
        ({"factory": "mynets.Several"}, r"Several: forward returns a str in which no tensor is found; "),
        ({"arch": "googlenet", "arguments": {"aux_logits": True}}, r"aux1\.conv\.conv: never called in eval mode"),
        ({"factory": "mynets.Plain", "channels": 1}, r"Plain: the forward pass fails on an input of shape \(2, 1, 32"),
    ],
)
def test_what_cannot_be_done_is_named(options, message):
    adapter = GraphAdapter(**options, image_size=32)
    with torch.device("meta"):
        model = adapter.skeleton()
    with pytest.raises(ValueError, match=message):
        adapter.groups(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"model\.adapter: arch=None with factory=None; give the name"),
        ({"arch": "resnet18", "factory": "mynets.Plain"}, r"arch=resnet18 with factory=mynets\.Plain"),
        ({"arch": "resnet19"}, r"torchvision has no model 'resnet19'; mobilenet_v2 is one"),
        ({"factory": "mynets.Plain", "weights": "V1"}, r"weights: V1 is torchvision's; set model\.adapter\.path"),
        ({"arch": "resnet18", "arguments": {"weights": "V1"}}, r"arguments\.weights: a skeleton has none"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GraphAdapter(**options)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("mynets.Nothing", r"factory: mynets\.Nothing cannot be imported"),
        ("mynets.torch.zeros", r"factory: mynets\.torch\.zeros is not defined in mynets"),
        ("torch.nn.init.calculate_gain", r"returns a float, not a module"),
    ],
)
def test_a_factory_that_is_none_is_refused(factory, message):
    arguments = {"nonlinearity": "relu"} if factory.startswith("torch") else {}
    with pytest.raises(ValueError, match=message):
        GraphAdapter(factory=factory, arguments=arguments).skeleton()


@pytest.fixture
def saved(random_units, tmp_path):
    """Save a slim model of the user's package."""
    spec = {"factory": "mynets.CifarResNet", "arguments": {"blocks": 1}, "image_size": 32}
    adapter = GraphAdapter(**spec)
    model = randomised(adapter.skeleton())
    groups = adapter.groups(model)
    keep = random_units(groups, 3)
    slim = materialize(model, groups, keep)
    spec["_target_"] = "hawada.adapters.graph.adapter.GraphAdapter"
    save_model(tmp_path, slim, adapter=adapter, adapter_spec=spec, teacher=model, groups=groups, keep=keep)
    return adapter, slim, tmp_path


def test_a_model_of_ones_own_is_loaded_where_its_package_is_trusted(saved):
    adapter, slim, path = saved
    inputs = adapter.example_inputs(Shape(2))
    with torch.no_grad():
        assert torch.equal(hawada.load(path, trust=["mynets."])(*inputs), slim(*inputs))
    assert adapter.loads_with("there", slim).endswith("hawada.load('there', trust=['mynets.'])")


@pytest.mark.parametrize("factory", ["mynets.CifarResNet", "os.system", "hawada.run.os.system"])
def test_a_factory_that_is_not_trusted_is_not_called(saved, factory):
    path = saved[2]
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["adapter"]["factory"] = factory
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"wants to run {factory}; if you trust it, pass trust="):
        load_model(path)


def test_an_architecture_of_torchvision_needs_no_trust(random_units, tmp_path):
    adapter, model = build("regnet_y_400mf", num_classes=5)
    groups, inputs = adapter.groups(model), adapter.example_inputs(Shape(2))
    keep = random_units(groups, 0)
    slim = materialize(model, groups, keep)
    spec = {"_target_": "hawada.adapters.graph.adapter.GraphAdapter", "arch": "regnet_y_400mf", "num_classes": 5}
    save_model(tmp_path, slim, adapter=adapter, adapter_spec=spec, teacher=model, groups=groups, keep=keep)
    loaded = load_model(tmp_path)
    with torch.no_grad():  # in double: which kernel runs depends on how a file's tensors are aligned
        assert torch.allclose(loaded.double()(inputs[0].double()), slim.double()(inputs[0].double()), rtol=1e-9)
    assert [repr(module) for module in loaded.modules()] == [repr(module) for module in slim.modules()]


def test_a_teacher_of_ones_own_comes_from_a_local_file(tmp_path):
    path = tmp_path / "cifar.safetensors"
    model = randomised(CifarResNet(blocks=1))
    save_file(model.state_dict(), path)
    options = {"factory": "mynets.CifarResNet", "arguments": {"blocks": 1}, "image_size": 32}
    adapter = GraphAdapter(**options, path=str(path))
    adapter.check_teacher()
    inputs = adapter.example_inputs(Shape(2))
    assert torch.equal(adapter.teacher()(*inputs), model(*inputs))


class Pretrained(CifarResNet):
    """A model whose weights are zero when it comes pretrained, as if they had been downloaded."""

    asked: ClassVar[list[bool]] = []

    def __init__(self, pretrained=False, num_classes=10):
        super().__init__(blocks=1, num_classes=num_classes)
        self.asked.append(pretrained)
        for parameter in self.parameters() if pretrained else ():
            nn.init.zeros_(parameter)


def test_a_factory_that_loads_its_own_weights_is_asked_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["mynets"], "Pretrained", Pretrained, raising=False)
    monkeypatch.setattr(Pretrained, "__module__", "mynets")
    Pretrained.asked.clear()
    adapter = GraphAdapter(factory="mynets.Pretrained", arguments={"pretrained": True}, image_size=32)
    adapter.check_teacher()
    assert not adapter.teacher().linear.weight.any() and all(Pretrained.asked)
    adapter.skeleton()
    assert not Pretrained.asked[-1]  # a saved model is built without fetching weights


def test_a_factory_of_random_weights_is_refused():
    adapter = GraphAdapter(factory="mynets.CifarResNet", arguments={"blocks": 1}, image_size=32)
    with pytest.raises(ValueError, match=r"CifarResNet returns a model with random weights; set model\.path to"):
        adapter.check_teacher()


def test_a_model_of_half_precision_is_pruned_in_single(monkeypatch):
    monkeypatch.setattr(sys.modules["mynets"], "half", lambda: CifarResNet(blocks=1).half(), raising=False)
    monkeypatch.setattr(sys.modules["mynets"].half, "__module__", "mynets")
    adapter = GraphAdapter(factory="mynets.half", image_size=32)
    model = adapter.teacher()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert adapter.groups(model) == adapter.groups(adapter.skeleton())


def test_old_names_in_torchvisions_checkpoints_fit(monkeypatch):
    with torch.device("meta"):
        state = torchvision.models.densenet121().state_dict()
    old = {
        name.replace("norm1", "norm.1")
        .replace("norm2", "norm.2")
        .replace("conv1.", "conv.1.")
        .replace("conv2.", "conv.2.")
        if "denselayer" in name
        else name: torch.zeros(tensor.shape)
        for name, tensor in state.items()
    }
    assert set(old) != set(state)
    monkeypatch.setattr(torchvision.models.DenseNet121_Weights, "get_state_dict", lambda *_, **__: old)
    assert not any(p.any() for p in GraphAdapter("densenet121", weights="IMAGENET1K_V1").teacher().parameters())


@pytest.mark.parametrize(("arch", "arguments"), [("resnet18", {}), ("mobilenet_v2", FEWER_BLOCKS), ("vgg11_bn", {})])
def test_coupled_axes_are_those_that_torch_pruning_finds(arch, arguments):
    """Fang et al., DepGraph: Towards Any Structural Pruning, 2023: the tensors that shrink with a convolution."""
    tp = pytest.importorskip("torch_pruning")
    adapter, model = build(arch, arguments=arguments, num_classes=5, stream=True)
    graph = tp.DependencyGraph().build_dependency(model, adapter.example_inputs(Shape(1)))
    paths = {module: path for path, module in model.named_modules()}
    for group in adapter.groups(model):
        if group.removes:
            continue
        first = model.get_submodule(group.cuts[0].tensor.rpartition(".")[0])
        prune = tp.prune_linear_out_channels if isinstance(first, nn.Linear) else tp.prune_conv_out_channels
        coupled = {
            (paths[item.dep.target.module], "in" if "in_channels" in item.dep.handler.__name__ else "out")
            for item in graph.get_pruning_group(first, prune, [0])
            if item.dep.target.module in paths
        }
        coupled = {(path, side) for path, side in coupled if sum(1 for _ in model.get_submodule(path).parameters())}
        ours = {(cut.tensor.rpartition(".")[0], "in" if cut.dim == 1 else "out") for cut in group.cuts}
        depthwise = {path for path, _ in ours if getattr(model.get_submodule(path), "groups", 1) > 1}
        assert {entry for entry in coupled if entry[0] not in depthwise} == {
            entry for entry in ours if entry[0] not in depthwise
        }
        assert depthwise <= {path for path, _ in coupled}


@pytest.mark.parametrize(("arch", "mean"), [("mobilenet_v2", 0.485), ("efficientnet_v2_l", 0.5)])
def test_weights_bring_the_normalisation_that_they_were_trained_with(arch: str, mean: float) -> None:
    normalisation = GraphAdapter(arch=arch, weights="IMAGENET1K_V1").normalisation()
    assert normalisation is not None and normalisation[0][0] == pytest.approx(mean)
    assert GraphAdapter(arch=arch).normalisation() is None
    assert GraphAdapter(arch=arch, weights="IMAGENET1K_V1", path="own.safetensors").normalisation() is None


@pytest.mark.parametrize(("arch", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_weights_of_nets_with_auxiliary_classifiers_are_read_without_these(arch, size, monkeypatch):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(arch, transform_input=True, init_weights=False)
    weights = torchvision.models.get_model_weights(arch)
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: theirs.state_dict())
    adapter = GraphAdapter(arch, image_size=size, weights="IMAGENET1K_V1")
    teacher, (image,) = adapter.teacher(), adapter.example_inputs(Shape(1))
    assert not any("aux" in name.lower() for name, _ in teacher.named_parameters())
    assert torch.equal(teacher(image), theirs.eval()(image))  # the model transforms its channels as in training
    assert len(adapter.groups(teacher)) > 50
