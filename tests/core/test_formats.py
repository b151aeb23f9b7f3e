import copy
import logging
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import ViTConfig, ViTForImageClassification

import hawada
from hawada.core import formats
from hawada.core.formats import FORMATS, check_formats, export_onnx, export_pt2

EXPORTS = {"onnx": export_onnx, "pt2": export_pt2}
MISSING = "export.formats: onnx needs onnxruntime and onnxscript; pip install hawada[onnx]"


def pick_logits(output):
    return output.logits


def same(output):
    return output


def pruned_convolutional():
    """One block gone, one reduced to its shortcut, one narrower inside; norms as if trained."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [2, 1, 1, 1], num_classes=7)
    model.layer1[1] = nn.Identity()
    model.layer2[0] = nn.Sequential(model.layer2[0].downsample)
    block = model.layer3[0]
    block.conv1, block.bn1, block.conv2 = (
        nn.Conv2d(128, 40, 3, 2, 1, bias=False),
        nn.BatchNorm2d(40),
        nn.Conv2d(40, 256, 3, 1, 1, bias=False),
    )
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def pruned_transformer():
    """Two heads of 16 on a stream of 48, which only a head_dim of its own allows."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return ViTForImageClassification(config).eval()


MODELS = {"convolutional": (pruned_convolutional, same), "transformer": (pruned_transformer, pick_logits)}


def images(rows, seed=0):
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=list(MODELS))
def written(request, tmp_path_factory):
    """(model, how its logits are picked, the folder with both files, what the exports returned)."""
    build, logits = MODELS[request.param]
    model, folder = build(), tmp_path_factory.mktemp(request.param)
    found = {name: export(model, (images(3),), folder / f"m.{name}", logits=logits) for name, export in EXPORTS.items()}
    return model, logits, folder, found


@pytest.fixture
def head():
    """A linear model, which exports in no time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


@torch.no_grad()
def assert_close(got, wanted):
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@torch.no_grad()
def test_the_graph_computes_the_models_logits_at_any_batch_size(written):
    model, logits, folder, _ = written
    session = onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    (entry,), (output,) = session.get_inputs(), session.get_outputs()
    assert entry.name == ("pixel_values" if logits is pick_logits else "x")
    assert (entry.shape, entry.type) == (["batch", 3, 32, 32], "tensor(float)")
    assert (output.name, output.shape[0]) == ("logits", "batch")
    for rows in (1, 2, 5):
        x = images(rows, seed=rows)
        assert_close(torch.from_numpy(session.run(None, {entry.name: x.numpy()})[0]), logits(model(x)))


@torch.no_grad()
def test_the_program_computes_the_models_logits_at_any_batch_size(written):
    model, logits, folder, _ = written
    loaded = torch.export.load(folder / "m.pt2").module()
    for rows in (1, 2, 5):
        x = images(rows, seed=rows)
        assert_close(loaded(x), logits(model(x)))


@torch.no_grad()
def test_what_is_returned_is_the_largest_of_both_batches(written):
    model, logits, _, found = written
    scale = float(logits(model(images(3))).abs().max())  # the other batch is one of its rows
    for name, tolerance in (("onnx", formats.ONNX_TOLERANCE), ("pt2", formats.PT2_TOLERANCE)):
        assert found[name]["max_abs_logit"] == pytest.approx(scale, rel=1e-5)
        assert found[name]["max_abs_diff"] <= tolerance * scale


def test_weights_are_in_the_one_file_and_where_it_was_written_is_not(written):
    _, _, folder, _ = written
    assert sorted(path.name for path in folder.iterdir()) == ["m.onnx", "m.pt2"]
    for path in folder.iterdir():
        content = path.read_bytes()
        for place in (Path(torch.__file__).parents[1], Path(hawada.__file__).parent):
            assert str(place).encode() not in content


@pytest.mark.parametrize("name", EXPORTS)
def test_one_row_is_no_constant_and_nothing_else_is_written_or_said(name, head, tmp_path, monkeypatch, capfd, recwarn):
    monkeypatch.chdir(tmp_path)
    export = EXPORTS[name]
    found = export(head.train(), (torch.randn(1, 3, 4),), Path(f"head.{name}"))
    assert set(found) == {"max_abs_diff", "max_abs_logit"}
    assert [path.name for path in tmp_path.iterdir()] == [f"head.{name}"]
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize("name", EXPORTS)
def test_the_model_is_left_as_it_was(name, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).to(torch.bfloat16)
    model[2].eval()
    model[1].bias.requires_grad_(False)
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    before, hooks = copy.deepcopy(model), dict(model[1]._forward_hooks)
    EXPORTS[name](model, (torch.randn(2, 3, 4, dtype=torch.bfloat16),), tmp_path / f"m.{name}")
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    assert model[1]._forward_hooks == hooks
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert now.requires_grad == then.requires_grad and now.grad is None
    for key, then in before.state_dict().items():
        now = model.state_dict()[key]
        assert (now.dtype, now.device) == (then.dtype, then.device) and torch.equal(now, then)


class Weighted(nn.Module):
    """Two inputs, one of whole numbers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, tokens, weight):
        return {"logits": (self.embedding(tokens) * weight.unsqueeze(-1)).sum(1)}


def test_whole_numbers_stay_and_every_input_has_its_name(tmp_path, recwarn):
    torch.manual_seed(0)
    inputs = (torch.randint(9, (2, 5)), torch.rand(2, 5, dtype=torch.float64))
    for name, export in EXPORTS.items():
        export(Weighted(), inputs, tmp_path / f"m.{name}", logits=lambda output: output["logits"])
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [(entry.name, entry.type, entry.shape) for entry in session.get_inputs()] == [
        ("tokens", "tensor(int64)", ["batch", 5]),
        ("weight", "tensor(float)", ["batch", 5]),
    ]
    assert not list(recwarn)


@pytest.mark.parametrize("name", EXPORTS)
def test_a_channels_last_model_is_written_with_contiguous_weights(name, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to(memory_format=torch.channels_last)
    EXPORTS[name](model, (images(2).to(memory_format=torch.channels_last),), tmp_path / f"m.{name}")
    assert not model[0].weight.is_contiguous()
    if name == "pt2":
        weight = torch.export.load(tmp_path / "m.pt2").state_dict["model.0.weight"]
        assert weight.is_contiguous() and torch.equal(weight, model[0].weight)


def tamper_onnx(monkeypatch, change):
    """Change the last weight in the file as soon as it is written."""
    export = torch.onnx.export

    def tampered(*args, f, **kwargs):
        export(*args, f=f, **kwargs)
        proto = onnx.load(f)
        (weight,) = [tensor for tensor in proto.graph.initializer if list(tensor.dims) == [4]]
        weight.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(weight)), weight.name))
        onnx.save(proto, f)

    monkeypatch.setattr(torch.onnx, "export", tampered)


def tamper_pt2(monkeypatch, change):
    """Change the last weight of what is loaded."""
    load = torch.export.load

    def tampered(path):
        program = load(path)
        weight = program.state_dict["model.1.bias"]
        weight.data.copy_(torch.as_tensor(change(weight.detach().numpy())))
        return program

    monkeypatch.setattr(torch.export, "load", tampered)


@pytest.mark.parametrize(("name", "tamper", "slight"), [("onnx", tamper_onnx, 1e-3), ("pt2", tamper_pt2, 1e-4)])
def test_a_file_that_computes_something_else_is_noticed_and_removed(name, tamper, slight, head, tmp_path, monkeypatch):
    inputs, path = (torch.randn(2, 3, 4),), tmp_path / f"m.{name}"
    scale = float(head(*inputs).detach().abs().max())
    for change in (lambda bias: bias + slight * scale, lambda bias: bias * float("nan")):
        with monkeypatch.context() as patch:
            tamper(patch, change)
            with pytest.raises(RuntimeError, match=rf"m\.{name}: logits differ from the model's by .* at a batch of 2"):
                EXPORTS[name](head, inputs, path)
        assert not path.exists()


def test_logits_of_another_shape_are_not_broadcast(head, tmp_path):
    inputs = (torch.randn(2, 3, 4),)
    with pytest.raises(RuntimeError, match=r"shape \(1, 4\), the model's \(2, 4\)"):
        formats._compare(head.requires_grad_(False), lambda x: head(x)[:1], inputs, tmp_path / "m", 1.0)


class TwoRows(nn.Module):
    """Works for a batch of two only."""

    def forward(self, x):
        return x.reshape(2, -1)


@pytest.mark.parametrize("name", EXPORTS)
def test_a_model_of_one_batch_size_is_refused_and_leaves_no_file(name, tmp_path):
    with pytest.raises(RuntimeError):
        EXPORTS[name](TwoRows(), (torch.randn(2, 3),), tmp_path / f"m.{name}")
    assert not list(tmp_path.iterdir())
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize("beside", ["", ".data"])
@pytest.mark.parametrize("name", EXPORTS)
def test_a_file_that_was_there_before_is_not_replaced(name, beside, tmp_path):
    path = tmp_path / f"m.{name}"
    (tmp_path / f"m.{name}{beside}").write_text("theirs")
    with pytest.raises(ValueError, match=rf"m\.{name}{beside} exists already and is not replaced; move it away, or wr"):
        EXPORTS[name](nn.Linear(3, 2), (torch.randn(2, 3),), path)
    assert [found.read_text() for found in tmp_path.iterdir()] == ["theirs"]


def test_known_formats_pass():
    check_formats(FORMATS)
    check_formats([])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["hf", "tflite"], "export.formats: 'tflite' is not one of hf, onnx, pt2"),
        ("onnx", "export.formats: 'onnx' is not a list; write [onnx]"),
    ],
)
def test_an_unknown_format_is_named(chosen, message):
    with pytest.raises(ValueError) as caught:
        check_formats(chosen)
    assert str(caught.value) == message


@pytest.mark.parametrize("absent", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_told_before_any_work(absent, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda package: None if package == absent else object())
    check_formats(["hf", "pt2"])
    with pytest.raises(ValueError) as caught:
        check_formats(FORMATS)
    assert str(caught.value) == MISSING
    with pytest.raises(ValueError) as caught:
        export_onnx(None, (), tmp_path / "m.onnx")
    assert str(caught.value) == MISSING
