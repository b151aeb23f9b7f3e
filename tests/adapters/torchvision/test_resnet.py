import random
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from hawada.adapters import Shape, load_model, save_model, weights
from hawada.adapters.torchvision import ResNetAdapter
from hawada.core.evaluate import compare_outputs
from hawada.core.gates import Student
from hawada.core.latency import Rounds, SimulatedClock, build_table
from hawada.core.structure import ExportPolicy, check_groups, keep_all, keep_first, materialize, widths_of

ONCE = Rounds(min_rounds=1, max_rounds=1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["tiny", "resnet50"])  # of basic blocks, and of bottlenecks
def test_hard_gated_equals_sliced(build_network, random_units, name, stream):
    adapter, model = build_network(name, stream=stream)
    groups, inputs = adapter.groups(model), adapter.example_inputs(Shape(2))
    student = Student(model, groups)
    removed = set()
    for seed in range(10):
        keep = random_units(groups, seed)
        removed |= {group.name for group in groups if group.removes and not keep[group.name]}
        slim = materialize(student.model, groups, keep)
        with torch.no_grad(), student.hard_gated(keep):
            found = compare_outputs(student(*inputs), slim(*inputs))
        assert found["max_abs_diff"] <= 1e-5 * found["max_abs_logit"]
    assert removed == {group.name for group in groups if group.removes}  # every branch was removed at least once


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_hard_gated_equals_sliced_on_cuda(tiny, random_units):
    adapter, model = tiny
    groups, inputs = adapter.groups(model), adapter.example_inputs(Shape(2))[0].cuda().double()
    student = Student(model.cuda().double(), groups)
    for seed in range(5):
        keep = random_units(groups, seed)
        slim = materialize(student.model, groups, keep)
        assert {parameter.device.type for parameter in slim.parameters()} == {"cuda"}
        with torch.no_grad(), student.hard_gated(keep):
            found = compare_outputs(student(inputs), slim(inputs))
        assert found["max_abs_diff"] <= 1e-5 * found["max_abs_logit"]


def test_only_shapes_change(tiny, random_units):
    adapter, model = tiny
    groups = adapter.groups(model)
    keep = keep_all(groups) | {"layer1.0.conv1": (1, 5), "layer2.0.branch": (), "layer1.1.branch": ()}
    slim = materialize(model, groups, keep)
    gone = [name for name in model.state_dict() if name.startswith(("layer1.1.", "layer2.0.conv", "layer2.0.bn"))]
    assert list(slim.state_dict()) == [name for name in model.state_dict() if name not in gone]
    assert slim.layer1[0].conv1.out_channels == slim.layer1[0].bn1.num_features == 2
    assert slim.layer1[0].conv2.in_channels == 2 and slim.layer1[0].conv2.out_channels == 64
    assert isinstance(slim.layer1[1], nn.Identity)


@pytest.mark.parametrize(("name", "branches", "channels"), [("tiny", 6, 6), ("resnet18", 8, 8), ("resnet50", 16, 32)])
def test_every_block_has_a_branch_its_inner_channels_and_a_site(build_network, name, branches, channels):
    adapter, model = build_network(name)
    groups, sites = adapter.groups(model), adapter.sites(model)
    check_groups(groups, model)
    assert [group.kind for group in groups].count("branch") == len(sites) == branches
    assert [group.kind for group in groups].count("channel") == channels
    touched = [group for site in sites for group in site.groups]
    assert sorted(touched) == sorted(group.name for group in groups)
    assert {site.kind for site in sites} == {"layer1", "layer2", "layer3", "layer4"}


@pytest.mark.parametrize("stream", [False, True])
def test_sites_come_in_order_of_execution(build_network, stream):
    adapter, model = build_network("tiny", stream=stream)
    sites, order = adapter.sites(model), []
    for site in sites:
        model.get_submodule(site.module).register_forward_hook(lambda *_, path=site.module: order.append(path))
    model(*adapter.example_inputs(Shape(1)))
    assert order == [site.module for site in sites]


def test_a_slim_network_can_be_pruned_again(tiny, random_units):
    adapter, model = tiny
    groups, inputs = adapter.groups(model), adapter.example_inputs(Shape(2))
    slim = materialize(model, groups, keep_all(groups) | {"layer1.0.branch": (), "layer4.0.conv1": (3, 4, 5)})
    fewer = adapter.groups(slim)
    assert "layer1.0.branch" not in {group.name for group in fewer}
    keep = random_units(fewer, 0)
    slimmer = materialize(slim, fewer, keep)
    with torch.no_grad(), Student(slim, fewer).hard_gated(keep) as student:
        found = compare_outputs(student(*inputs), slimmer(*inputs))
    assert found["max_abs_diff"] <= 1e-5 * found["max_abs_logit"]


STREAMS = {
    "tiny": {"layer1": (64, 4), "layer2": (128, 3), "layer3": (256, 2), "layer4": (512, 1)},
    "resnet18": {"layer1": (64, 4), "layer2": (128, 3), "layer3": (256, 3), "layer4": (512, 2)},
    "resnet50": {"conv1": (64, 2), "layer1": (256, 4), "layer2": (512, 5), "layer3": (1024, 7), "layer4": (2048, 3)},
}


@pytest.mark.parametrize("name", STREAMS)
def test_each_stage_has_a_stream_that_is_gated_once_per_consumer(name, build_network):
    adapter, model = build_network(name, stream=True)
    streams = [group for group in adapter.groups(model) if group.kind == "stream"]
    check_groups(streams, model)
    found = {group.name: (group.units, len({point.module for point in group.gated_at})) for group in streams}
    assert found == {f"{stage}.stream": expected for stage, expected in STREAMS[name].items()}
    points = [point.module for group in streams for point in group.gated_at]
    assert len(points) == len(set(points))
    cut = [(cut.tensor, cut.dim) for group in streams for cut in group.cuts]
    assert len(cut) == len(set(cut))


def test_the_stem_joins_a_stream_only_where_it_is_added_into(build_network):
    for name, joins in (("resnet18", True), ("resnet50", False)):
        adapter, model = build_network(name, stream=True)
        streams = {group.name: group for group in adapter.groups(model)}
        assert ("conv1.weight" in {cut.tensor for cut in streams["layer1.stream"].cuts}) == joins
        assert ("conv1.stream" in streams) != joins
        assert "conv1" in {site.module for site in adapter.sites(model)}


def test_without_the_option_nothing_is_declared_of_streams(build_network):
    narrow, model = build_network("tiny", stream=True)
    plain = build_network("tiny")[0]
    assert plain.groups(model) == [group for group in narrow.groups(model) if group.kind != "stream"]
    assert {site.reads for site in plain.sites(model)} == {None}


def test_a_narrow_stream_is_cut_at_its_producers_and_consumers(build_network):
    adapter, model = build_network("tiny", stream=True)
    groups = adapter.groups(model)
    keep = {"layer1.stream": (3, 5, 63), "layer2.stream": (0, 7), "layer4.stream": (1, 2, 3, 4)}
    keep = keep_all(groups) | keep | {"layer1.1.branch": (), "layer2.0.branch": ()}
    slim = materialize(model, groups, keep)
    assert repr(materialize(model, groups, keep, prefix="layer2.0")) == repr(slim.layer2[0])
    assert (slim.conv1.out_channels, slim.bn1.num_features, slim.layer1[0].conv1.in_channels) == (3, 3, 3)
    assert (slim.layer1[0].conv2.out_channels, slim.layer1[0].bn2.num_features) == (3, 3)
    projection = slim.layer2[0].downsample
    assert (projection[0].in_channels, projection[0].out_channels, projection[1].num_features) == (3, 2, 2)
    assert slim.layer2[0].relu and not hasattr(slim.layer2[0], "conv1")
    assert (slim.layer3[0].conv1.in_channels, slim.layer3[0].downsample[0].in_channels) == (2, 2)
    assert slim.layer3[0].downsample[0].out_channels == 256 and slim.fc.in_features == 4
    assert torch.equal(slim.conv1.weight, model.conv1.weight[[3, 5, 63]])
    assert torch.equal(slim.fc.weight, model.fc.weight[:, [1, 2, 3, 4]])


@pytest.mark.parametrize("name", ["tiny", "resnet50"])
def test_a_network_with_narrow_streams_is_saved_and_loaded(build_network, specs, random_units, name, tmp_path):
    adapter, model = build_network(name, stream=True)
    spec = {"_target_": "hawada.adapters.torchvision.resnet.ResNetAdapter", **specs[name], "stream": True}
    groups, inputs = adapter.groups(model), adapter.example_inputs(Shape(2))
    for seed in range(3):
        keep = random_units(groups, seed)
        slim = materialize(model, groups, keep)
        path = tmp_path / str(seed)
        save_model(path, slim, adapter=adapter, adapter_spec=spec, teacher=model, groups=groups, keep=keep)
        loaded = load_model(path)
        with torch.no_grad():
            assert torch.equal(loaded(*inputs), slim(*inputs))
        assert [repr(module) for module in loaded.modules()] == [repr(module) for module in slim.modules()]


def test_a_network_with_narrow_streams_can_be_pruned_again(build_network, random_units):
    adapter, model = build_network("tiny", stream=True)
    groups, inputs = adapter.groups(model), adapter.example_inputs(Shape(2))
    narrow = {f"layer{stage}.stream": tuple(range(1, 40)) for stage in (1, 2, 3, 4)}
    for gone in ("layer1.0.branch", "layer1.1.branch", "layer2.0.branch", "layer4.0.branch"):
        slim = materialize(model, groups, keep_all(groups) | narrow | {gone: ()})
        fewer = adapter.groups(slim)
        check_groups(fewer, slim)
        assert {group.units for group in fewer if group.kind == "stream"} == {39}
        assert len(adapter.sites(slim)) == 12 - gone.startswith("layer1.")  # the projection that stays is timed
        keep = random_units(fewer, 0)
        slimmer = materialize(slim, fewer, keep)
        with torch.no_grad(), Student(slim, fewer).hard_gated(keep) as student:
            found = compare_outputs(student(*inputs), slimmer(*inputs))
        assert found["max_abs_diff"] <= 1e-5 * found["max_abs_logit"]


def test_the_sites_of_a_network_with_narrow_streams_add_up(build_network):
    """On a device whose operators add up, each site gets the channels that it still consumes, and none is missing."""
    adapter, model = build_network("tiny", stream=True)
    groups, inputs, clock = adapter.groups(model), adapter.example_inputs(Shape(2)), SimulatedClock(tile=1)
    table = build_table(
        model, groups, adapter.sites(model), [(1, model, inputs)], clock, policy=ExportPolicy(), points=3, rounds=ONCE
    )
    grids = {name: grid for entry in table.sites for name, grid in zip(entry.site.groups, entry.grid, strict=True)}
    assert set(grids) == {group.name for group in groups}
    draw, rests = random.Random(0), []
    for _ in range(8):
        keep = keep_first(groups, {name: draw.choice(grid) for name, grid in grids.items()})
        widths = widths_of(keep, groups)
        whole = clock.prepare(materialize(model, groups, keep), inputs)()
        rests.append(whole - sum(float(entry.interpolate(widths)) for entry in table.sites))
    assert max(rests) - min(rests) < 1e-6


def test_example_inputs_are_always_the_same():
    adapter = ResNetAdapter(image_size=48)
    (first,), (again,) = adapter.example_inputs(Shape(2)), adapter.example_inputs(Shape(2))
    assert first.shape == (2, 3, 48, 48) and torch.equal(first, again)


def test_a_skeleton_costs_nothing_on_meta():
    with torch.device("meta"):
        model = ResNetAdapter("resnet50").skeleton()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"} and not model.training


def test_resnext_keeps_as_many_channels_of_each_of_a_convolutions_groups():
    adapter = ResNetAdapter("resnext50_32x4d")
    with torch.device("meta"):
        groups = adapter.groups(adapter.skeleton())
    grouped = [group for group in groups if group.parent is not None]
    assert len(grouped) == 32 and {group.kind for group in grouped} == {"grouped"}
    for group in grouped:
        written = next(cut for cut in group.cuts if cut.tensor == f"{group.name}.weight" and cut.dim == 0)
        assert len(written.elements([0])) == 32  # one filter for each of the convolution's groups


def test_another_family_is_refused():
    for declare in (ResNetAdapter().groups, ResNetAdapter().sites):
        with pytest.raises(
            ValueError, match=r"Linear is no ResNet of torchvision's; is model\.adapter the right one\?"
        ):
            declare(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "basic"}, r"model\.adapter: arch=basic with layers=None; layers go with basic or bottleneck only"),
        ({"arch": "resnet18", "layers": [1, 1, 1, 1]}, r"model\.adapter: arch=resnet18 with layers=\[1, 1, 1, 1\]"),
        ({"arch": "resnet19"}, r"model\.adapter\.arch: torchvision has no model 'resnet19'; resnet18 is one"),
    ],
)
def test_impossible_architectures_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ResNetAdapter(**options)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Set up an empty cache and no network."""

    def unreachable(*args, **options):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(weights.urllib.request, "urlopen", unreachable)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("method", ["teacher", "check_teacher"])
def test_without_network_the_local_path_is_named(method):
    adapter = ResNetAdapter("resnet18", weights="IMAGENET1K_V1")
    with pytest.raises(ValueError, match=r"IMAGENET1K_V1 .*Name or service not known.*set model\.adapter\.path to a"):
        getattr(adapter, method)()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("method", ["teacher", "check_teacher"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"model\.adapter: no weights and no path; set model\.adapter\.path"),
        (
            {"arch": "basic", "layers": [1, 1, 1, 1]},
            r"model\.adapter: no weights and no path; set model\.adapter\.path",
        ),
        ({"weights": "IMAGENET1K_V9"}, r"model\.adapter\.weights: resnet18 has no weights 'IMAGENET1K_V9'"),
        ({"path": "/nowhere"}, r"model\.adapter\.path: /nowhere is neither a file of weights nor a "),
    ],
)
def test_a_teacher_that_cannot_be_had_is_explained(method, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(ResNetAdapter(**options), method)()


def test_cached_weights_need_no_network(offline, tmp_path):
    adapter = ResNetAdapter("resnet18", weights="IMAGENET1K_V1")
    file = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / file).touch()
    adapter.check_teacher()


TINY = {"arch": "basic", "layers": [2, 2, 1, 1], "num_classes": 10, "image_size": 32}


def test_a_teacher_from_a_local_file(tiny, tmp_path):
    _, model = tiny
    path = tmp_path / "tiny.safetensors"
    save_file(model.state_dict(), path)
    adapter = ResNetAdapter(**TINY, path=str(path))
    adapter.check_teacher()
    teacher = adapter.teacher()
    inputs = adapter.example_inputs(Shape(2))
    assert not teacher.training
    assert torch.allclose(teacher(*inputs), model(*inputs), atol=1e-5)


def test_downloaded_weights_are_the_teacher(monkeypatch):
    model = torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda *_, **__: model.state_dict())
    teacher = ResNetAdapter("resnet18", weights="IMAGENET1K_V1").teacher()
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_local_file_of_another_shape_is_refused(tiny, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(tiny[1].state_dict(), path)
    with pytest.raises(
        ValueError, match=r"model\.adapter\.path: .*tiny\.safetensors does not fit basic with 7 classes: size mismatch"
    ):
        ResNetAdapter(**(TINY | {"num_classes": 7}), path=str(path)).teacher()


def test_a_local_file_that_is_no_safetensors_is_refused(tiny, tmp_path):
    path = tmp_path / "tiny.safetensors"
    torch.save(tiny[1].state_dict(), path)
    with pytest.raises(ValueError, match=r"model\.adapter\.path: .*tiny\.safetensors is not a safetensors file"):
        ResNetAdapter(**TINY, path=str(path)).teacher()


def test_downloaded_weights_for_another_number_of_classes_are_refused(monkeypatch):
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda *_, **__: state)
    with pytest.raises(ValueError, match=r"model\.adapter"):
        ResNetAdapter("resnet18", num_classes=10, weights="IMAGENET1K_V1").teacher()
