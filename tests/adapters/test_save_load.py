import hashlib
import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import hawada
from hawada.adapters import Shape, load_model, save_model
from hawada.adapters.base import MANIFEST, WEIGHTS
from hawada.adapters.graph import GraphAdapter
from hawada.adapters.huggingface import LlamaAdapter, ViTAdapter
from hawada.adapters.saved import RENAMED_ADAPTERS
from hawada.adapters.torchvision import ResNetAdapter
from hawada.core.structure import full_widths, keep_all, keep_first, materialize

SPEC = {"arch": "basic", "layers": [2, 2, 1, 1], "num_classes": 10, "image_size": 32}
TARGET = "hawada.adapters.torchvision.resnet.ResNetAdapter"


@pytest.fixture
def save(tiny, tmp_path):
    adapter, model = tiny
    groups = adapter.groups(model)

    def write(changes=(), target=TARGET):
        keep = keep_all(groups) | dict(changes)
        slim = materialize(model, groups, keep)
        path = tmp_path / "slim"
        spec = {"_target_": target, **SPEC}
        save_model(path, slim, adapter=adapter, adapter_spec=spec, teacher=model, groups=groups, keep=keep)
        return path, slim

    return write


def edit_manifest(path, **changes):
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer1.0.conv1": (0, 9, 63), "layer4.0.conv1": tuple(range(0, 512, 2))},
        {"layer1.1.branch": ()},  # without downsample
        {"layer2.0.branch": ()},  # with downsample
        {"layer1.0.branch": (), "layer3.0.branch": (), "layer2.1.conv1": (5,)},
    ],
)
def test_round_trip(save, tiny, changes):
    path, slim = save(changes)
    inputs = tiny[0].example_inputs(Shape(2))
    for loaded in (load_model(path), hawada.load(str(path))):
        assert list(loaded.state_dict()) == list(slim.state_dict())
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in slim.state_dict().items())
        assert not loaded.training
        assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
        assert torch.allclose(loaded(*inputs), slim(*inputs), atol=1e-5)
        assert [repr(module) for module in loaded.modules()] == [repr(module) for module in slim.modules()]


def test_a_loaded_model_trains(save):
    model = load_model(save({"layer2.0.branch": ()})[0]).train()
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_weights_are_plain_safetensors_and_the_manifest_plain_json(save):
    path, slim = save({"layer1.0.conv1": (0, 9)})
    assert set(load_file(path / WEIGHTS)) == set(slim.state_dict())
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["keep"]["layer1.0.conv1"] == [0, 9]
    assert {file.name for file in path.iterdir()} == {MANIFEST, WEIGHTS}


def test_a_saved_folder_is_a_teacher(save, tiny):
    path, same = save({})
    adapter = ResNetAdapter(**SPEC, path=str(path))
    adapter.check_teacher()
    inputs = adapter.example_inputs(Shape(2))
    assert torch.equal(adapter.teacher()(*inputs), same(*inputs))


def test_a_slim_folder_is_refused_as_a_teacher(save):
    path, _ = save({"layer1.0.conv1": (0, 9)})
    with pytest.raises(ValueError, match=r"model\.adapter\.path: .*does not fit basic"):
        ResNetAdapter(**SPEC, path=str(path)).teacher()


def test_saving_again_replaces_what_was_there(save):
    save({"layer1.1.branch": ()})
    path, slim = save({"layer1.0.conv1": (0, 9)})
    loaded = load_model(path).state_dict()
    assert list(loaded) == list(slim.state_dict()) and loaded["layer1.0.conv1.weight"].shape[0] == 2


def test_damaged_weights_are_noticed(save):
    path, _ = save()
    data = bytearray((path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (path / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=r"does not match the checksum in hawada\.json: copy or export it again"):
        load_model(path)


def test_missing_weights_are_noticed(save):
    path, _ = save()
    (path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=WEIGHTS):
        load_model(path)


def test_a_folder_without_manifest_is_no_model(save, tmp_path):
    path, _ = save()
    (path / MANIFEST).unlink()
    for folder in (path, tmp_path / "nothing"):
        with pytest.raises(
            ValueError, match=r"holds no hawada\.json: not a saved model, or its writing was interrupted"
        ):
            load_model(folder)


def test_weights_of_another_structure_are_refused(save):
    path, _ = save()
    edit_manifest(path, replaced={"layer1.1": []})
    with pytest.raises(
        ValueError, match=r"does not fit its manifest: layer1\.1\..* is on one side only; export it again"
    ):
        load_model(path)


def test_an_adapter_that_is_not_trusted_is_not_even_imported(save, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path, _ = save(target="stranger.Adapter")
    message = r"wants to run stranger\.Adapter; if you trust it, pass trust=\['stranger\.'\]"
    for trust in ((), ("strange_friend.",)):
        with pytest.raises(ValueError, match=message):
            load_model(path, trust)
    assert "stranger" not in sys.modules


def test_a_package_whose_name_begins_like_ours_is_not_trusted(save):
    path, _ = save(target="hawada_evil.Adapter")
    with pytest.raises(ValueError, match=r"wants to run hawada_evil\.Adapter"):
        load_model(path)


def test_a_trusted_adapter_is_used(save, tiny, monkeypatch):
    class Mine(ResNetAdapter):
        pass

    monkeypatch.setitem(sys.modules, "mypackage", types.SimpleNamespace(Mine=Mine))
    path, slim = save(target="mypackage.Mine")
    inputs = tiny[0].example_inputs(Shape(1))
    assert torch.allclose(load_model(path, ["mypackage."])(*inputs), slim(*inputs), atol=1e-5)


def test_a_manifest_cannot_call_what_is_no_adapter(save, tmp_path):
    """Trust in a package covers its adapters, not every function in it: this one would write a file."""
    path, _ = save()
    source = tmp_path / "source"
    source.write_text("payload")
    spec = {
        "_target_": "torchvision.datasets.utils.download_url",
        "url": source.as_uri(),
        "root": str(tmp_path / "out"),
    }
    edit_manifest(path, adapter=spec)
    with pytest.raises(ValueError, match=r"torchvision\.datasets\.utils\.download_url"):
        load_model(path)
    assert not (tmp_path / "out").exists()


def test_a_finetuned_model_keeps_its_numbers(tiny, tmp_path):
    adapter, model = tiny
    groups = adapter.groups(model)
    keep = keep_all(groups) | {"layer2.0.conv1": (1, 2)}
    slim = materialize(model, groups, keep).half()
    with torch.no_grad():
        slim.fc.bias.add_(1.0)
    spec = {"_target_": TARGET, **SPEC}
    save_model(tmp_path, slim, adapter=adapter, adapter_spec=spec, teacher=model, groups=groups, keep=keep)
    loaded = load_model(tmp_path)
    assert loaded.fc.bias.dtype == torch.float16 and torch.equal(loaded.fc.bias, slim.fc.bias)


def test_only_the_structure_of_the_teacher_matters(tiny, tmp_path):
    adapter, model = tiny
    with torch.device("meta"):
        skeleton = adapter.skeleton()
    keep = keep_all(adapter.groups(model)) | {"layer2.0.conv1": (1, 2)}
    slim = materialize(model, adapter.groups(model), keep)
    spec = {"_target_": TARGET, **SPEC}
    skeleton_groups = adapter.groups(skeleton)
    save_model(tmp_path, slim, adapter=adapter, adapter_spec=spec, teacher=skeleton, groups=skeleton_groups, keep=keep)
    inputs = adapter.example_inputs(Shape(1))
    assert torch.allclose(load_model(tmp_path)(*inputs), slim(*inputs), atol=1e-5)


def test_weights_with_an_unknown_tensor_are_refused(save):
    path, slim = save()
    save_file({**slim.state_dict(), "zzz": torch.zeros(1)}, path / WEIGHTS)
    edit_manifest(path, sha256={WEIGHTS: hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()})
    with pytest.raises(ValueError, match="zzz is on one side only"):
        load_model(path)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 17,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 16,
    "pad_token_id": 16,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
CONVNET = {"arch": "squeezenet1_1", "factory": None, "arguments": None, "num_classes": 5, "image_size": 32}
# By the name that version 0.1 wrote into a manifest: today's class and the arguments that stood beside the name.
WRITTEN_BY_0_1 = {
    "hawada.adapters.convnet.adapter.ConvNetAdapter": (GraphAdapter, CONVNET | {"channels": 3, "stream": False}),
    "hawada.adapters.torchvision.resnet.ResNetAdapter": (ResNetAdapter, SPEC | {"stream": False}),
    "hawada.adapters.huggingface.llama.LlamaAdapter": (
        LlamaAdapter,
        {"branches": False, "stream": False, "config": LLAMA},
    ),
    "hawada.adapters.huggingface.vit.ViTAdapter": (ViTAdapter, {"branches": True, "stream": True, "config": VIT}),
}


def save_slim(folder, adapter, target, arguments, widths):
    """Save a slim model that has the given widths, under a manifest that names the adapter by `target`."""
    torch.manual_seed(0)
    teacher = adapter.skeleton()
    groups = adapter.groups(teacher)
    keep = keep_first(groups, full_widths(groups) | widths)
    slim, spec = adapter.slim(teacher, groups, keep), {"_target_": target, **arguments}
    save_model(folder, slim, adapter=adapter, adapter_spec=spec, teacher=teacher, groups=groups, keep=keep)
    return slim


def check_equal(loaded, slim):
    """Check that two models are of one class and have the same tensors, bit for bit."""
    assert type(loaded).__name__ == type(slim).__name__
    assert list(loaded.state_dict()) == list(slim.state_dict())
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in slim.state_dict().items())


def test_every_adapter_that_an_earlier_version_named_is_in_the_table():
    assert set(WRITTEN_BY_0_1) == set(RENAMED_ADAPTERS)


@pytest.mark.parametrize("target", WRITTEN_BY_0_1)
def test_a_folder_of_an_earlier_version_is_loaded(target, tmp_path):
    adapter_class, arguments = WRITTEN_BY_0_1[target]
    adapter = adapter_class(**arguments)
    widths = {"features.3.squeeze": 7, "layer1.0.conv1": 2, "model.layers.0": 0, "vit.layers.1.ffn": 5}
    with torch.device("meta"):
        names = {group.name for group in adapter.groups(adapter.skeleton())}
    slim = save_slim(tmp_path, adapter, target, arguments, {name: widths[name] for name in names & set(widths)})
    assert json.loads((tmp_path / MANIFEST).read_text())["adapter"] == {"_target_": target, **arguments}
    check_equal(hawada.load(tmp_path), slim)


def test_a_heterogeneous_config_of_an_earlier_version_is_loaded(tmp_path):
    """Version 0.1 wrote this config.json, with the widths of each layer under "slim"."""
    target = "hawada.adapters.huggingface.vit.ViTAdapter"
    adapter_class, arguments = WRITTEN_BY_0_1[target]
    widths = {"vit.layers.0.ffn": 6, "vit.layers.1.attention": 0}
    slim = save_slim(tmp_path, adapter_class(**arguments), target, arguments, widths)
    record = {
        "architectures": ["SlimViTForImageClassification"],
        "attention_probs_dropout_prob": 0.0,
        "dtype": "float32",
        "encoder_stride": 16,
        "head_dim": 4,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 16,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
        "image_size": 8,
        "initializer_range": 0.02,
        "intermediate_size": 1,
        "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
        "layer_norm_eps": 1e-12,
        "model_type": "slim_vit",
        "num_attention_heads": 1,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 4,
        "pooler_act": "tanh",
        "pooler_output_size": 16,
        "qkv_bias": True,
        "slim": {
            "auto": "AutoModelForImageClassification",
            "branches": {"attention": ["attention", "layernorm_before", 2], "mlp": ["mlp", "layernorm_after", 1]},
            "layers": "vit.layers",
            "widths": [
                {"intermediate_size": 6, "num_attention_heads": 4},
                {"attention": False, "intermediate_size": 24},
            ],
        },
        "transformers_version": "5.24.0",
        "auto_map": {
            "AutoConfig": "modeling_slim.SlimViTConfig",
            "AutoModelForImageClassification": "modeling_slim.SlimViTForImageClassification",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(record))
    check_equal(hawada.load(tmp_path), slim)


def test_a_manifest_of_another_format_is_refused(save):
    path, _ = save()
    edit_manifest(path, format=1)
    with pytest.raises(ValueError, match=r"is not of format 2: another version wrote it; export the model again"):
        load_model(path)


def test_channels_that_lie_innermost_in_memory_do_so_after_loading(tmp_path):
    torch.manual_seed(0)
    adapter = ResNetAdapter("basic", [1, 1, 1, 1], num_classes=5, image_size=32)
    model = adapter.skeleton().to(memory_format=torch.channels_last)
    groups = adapter.groups(model)
    keep = keep_first(groups, {group.name: max(1, group.units // 2) for group in groups})
    slim = adapter.slim(model, groups, keep)
    spec = {"_target_": "hawada.adapters.torchvision.ResNetAdapter", "arch": "basic", "layers": [1, 1, 1, 1]}
    spec |= {"num_classes": 5, "image_size": 32}
    save_model(tmp_path / "m", slim, adapter=adapter, adapter_spec=spec, teacher=model, groups=groups, keep=keep)
    loaded = load_model(tmp_path / "m")
    assert loaded.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    inputs = adapter.example_inputs(Shape(2))
    assert torch.equal(loaded(*inputs), slim(*inputs))
