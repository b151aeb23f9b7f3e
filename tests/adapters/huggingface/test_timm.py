"""timm's networks: their weights, their image size and normalisation, and what is refused."""

import sys

import pytest
import torch

from hawada.adapters import Shape
from hawada.adapters.huggingface import TimmAdapter, hub

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("arch", ["test_efficientnet", "test_vit"])
def test_gated_units_and_inputs_are_those_of_timm(arch):
    adapter = TimmAdapter(arch, num_classes=5)
    size = timm.get_pretrained_cfg(arch).input_size
    inputs = adapter.example_inputs(Shape(2))
    assert inputs[0].shape == (2, *size)
    model = adapter.skeleton()
    assert model(*inputs).shape == (2, 5)
    assert adapter.groups(model) and adapter.normalisation()[0] == timm.get_pretrained_cfg(arch).mean


def test_local_weights_are_the_teacher(tmp_path):
    model = timm.create_model("test_resnet", num_classes=4).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "net.pth")
    adapter = TimmAdapter("test_resnet", num_classes=4, path=str(tmp_path / "net.pth"))
    adapter.check_teacher()
    inputs = adapter.example_inputs(Shape(2))
    assert torch.equal(adapter.teacher()(*inputs), model(*inputs))
    with pytest.raises(ValueError, match=r"net\.pth does not fit test_resnet with 3 classes: .*fc\.weight"):
        TimmAdapter("test_resnet", num_classes=3, path=str(tmp_path / "net.pth")).check_teacher()


def test_weights_of_the_hub_are_the_teacher(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    model = timm.create_model("test_resnet").eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(hub, "check_source", lambda repo: None)
    monkeypatch.setattr(hub, "fetch", lambda repo: tmp_path)
    adapter = TimmAdapter("test_resnet")
    inputs = adapter.example_inputs(Shape(2))
    assert torch.equal(adapter.teacher()(*inputs), model(*inputs))


def test_another_image_size_is_built_into_a_vit():
    adapter = TimmAdapter("test_vit", image_size=96)
    model, inputs = adapter.skeleton(), adapter.example_inputs(Shape(1))
    assert inputs[0].shape[-1] == 96 and model(*inputs).shape == (1, 1000)


def test_what_timm_does_not_have_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"model\.adapter\.arch: timm has no model 'mobilenetv3_small'; .* are some"):
        TimmAdapter("mobilenetv3_small")
    with pytest.raises(ValueError, match=r"the weights of test_resnet know 1000 classes and not 7; leave it out, or"):
        TimmAdapter("test_resnet", num_classes=7).check_teacher()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm is not installed; pip install 'hawada\[timm\]'"):
        TimmAdapter("test_resnet")


def test_without_the_hub_the_local_path_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "find_local", lambda source: None)
    with pytest.raises(ValueError, match=r"model\.path: timm/test_resnet\S* is not in the Hugging Face cache .*or set"):
        TimmAdapter("test_resnet").check_teacher()
