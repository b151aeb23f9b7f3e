from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from hawada.adapters.base import Shape
from hawada.adapters.torchvision import resnet
from hawada.adapters.torchvision.resnet import ResNetAdapter
from hawada.core.evaluate import compare_outputs
from hawada.core.export import materialize
from hawada.core.structure import check_groups, keep_all
from hawada.core.student import Student


@pytest.mark.parametrize("name", ["tiny", "resnet18", "resnet50"])
def test_hard_gated_equals_sliced(build_network, random_units, name):
    adapter, model = build_network(name)
    groups, inputs = adapter.groups(model), adapter.example_inputs(Shape(2))
    student = Student(model, groups)
    removed = set()
    for seed in range(20):
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


def test_sites_come_in_order_of_execution(tiny):
    adapter, model = tiny
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


def test_example_inputs_are_always_the_same():
    adapter = ResNetAdapter(image_size=48)
    (first,), (again,) = adapter.example_inputs(Shape(2)), adapter.example_inputs(Shape(2))
    assert first.shape == (2, 3, 48, 48) and torch.equal(first, again)


def test_a_skeleton_costs_nothing_on_meta():
    with torch.device("meta"):
        model = ResNetAdapter("resnet50").skeleton()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"} and not model.training


def test_resnext_is_refused():
    adapter = ResNetAdapter("resnext50_32x4d")
    with torch.device("meta"):
        model = adapter.skeleton()
    for declare in (adapter.groups, adapter.sites):
        with pytest.raises(ValueError, match=r"layer1\.0: grouped convolutions \(ResNeXt\) are not supported"):
            declare(model)


def test_another_family_is_refused():
    with pytest.raises(
        ValueError, match=r"Linear has no torchvision residual block; is model\.adapter the right one\?"
    ):
        ResNetAdapter().groups(nn.Linear(1, 1))


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
    """An empty cache and no way out."""

    def unreachable(*args, **options):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(resnet.urllib.request, "urlopen", unreachable)


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
        ({"path": "/nowhere"}, r"model\.adapter\.path: /nowhere is neither a \.safetensors file nor a "),
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
    """The likeliest mistake: torchvision's own .pth."""
    path = tmp_path / "tiny.pth"
    torch.save(tiny[1].state_dict(), path)
    with pytest.raises(ValueError, match=r"model\.adapter\.path: .*tiny\.pth"):
        ResNetAdapter(**TINY, path=str(path)).teacher()


def test_downloaded_weights_for_another_number_of_classes_are_refused(monkeypatch):
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda *_, **__: state)
    with pytest.raises(ValueError, match=r"model\.adapter"):
        ResNetAdapter("resnet18", num_classes=10, weights="IMAGENET1K_V1").teacher()
