import copy
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hawada
from hawada.adapters import Shape, load_model, save_model
from hawada.adapters.base import MANIFEST
from hawada.adapters.huggingface import LlamaAdapter
from hawada.adapters.huggingface.slim_model import build_filled, read_config, save_folder, slim_name, slim_state
from hawada.core.distill import Distillation, KDConfig, hidden_mse
from hawada.core.gates import Student
from hawada.core.structure import completed, keep_all, plan_edits
from hawada.core.task import IGNORED

FAMILIES = ["mha", "gqa4", "gqa8", "mistral", "qwen2", "qwen3", "smollm3", "vit"]
SHAPE = Shape(2, "forward", 12, 4)
WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def save(build_model, tmp_path):
    """Saves a slim model as an export does; returns the folder, the adapter and the model."""

    def write(family, choose, **options):
        adapter, teacher = build_model(family, **options)
        groups = adapter.groups(teacher)
        keep = choose(groups)
        slim = adapter.slim(teacher, groups, keep)
        spec = {"_target_": f"{type(adapter).__module__}.{type(adapter).__name__}", "config": adapter.config}
        folder = tmp_path / "slim"
        save_model(folder, slim, adapter=adapter, adapter_spec=spec, teacher=teacher, groups=groups, keep=keep)
        return folder, adapter, slim

    return write


def two_thirds(groups):
    """The same units in every layer: a uniform model with fewer heads, neurons, stream and layers."""
    counts = {"kv_head": 1, "head": 3, "ffn": 24, "stream": 33}
    keep = {group.name: tuple(range(counts[group.kind])) for group in groups if group.kind in counts}
    return completed({**keep, groups[0].name: ()}, groups)


def ragged(groups):
    """Different widths in every layer, no attention in the last, and a stream that no number of heads divides."""
    keep = {group.name: tuple(range(index + 4)) for index, group in enumerate(groups) if group.kind == "ffn"}
    keep |= {group.name: tuple(range(31)) for group in groups if group.kind == "stream"}
    last = [group.name for group in groups if group.kind == "attention"][-1:]
    return completed({**keep, **dict.fromkeys(last, ())}, groups)


def sign_again(folder):
    """Put the weights' own checksum into the manifest, so that only the loading itself can notice damage."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sha256"] = {WEIGHTS: hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def change_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    sign_again(folder)


def change_config(folder, change):
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize("choose", [two_thirds, ragged])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, choose, save):
    folder, adapter, slim = save(family, choose, branches=choose is ragged)
    loaded = hawada.load(folder)
    assert type(loaded) is type(slim) and not loaded.training
    assert list(loaded.state_dict()) == list(slim.state_dict())
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in slim.state_dict().items())
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    inputs = adapter.example_inputs(SHAPE)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs).logits, slim(*inputs).logits)
    written = dict.fromkeys(("dtype", "architectures", "auto_map", "_name_or_path"))
    assert loaded.config.to_dict() | written == slim.config.to_dict() | written
    if family == "gqa4":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert "lm_head.weight" not in load_file(folder / WEIGHTS)


def test_a_folder_holds_a_tokenizer_and_no_pickle(save):
    folder, _, _ = save("gqa4", two_thirds)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", WEIGHTS, MANIFEST, "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".py"))]


def test_the_tokenizer_of_a_checkpoint_goes_along(build_model, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    adapter, model = build_model("gqa4")
    model.save_pretrained(source)
    adapter.tokenizer().save_pretrained(source)
    named = LlamaAdapter(path=str(source), stream=True)
    teacher = named.teacher()
    groups = named.groups(teacher)
    keep = two_thirds(groups)
    spec = {"_target_": "hawada.adapters.huggingface.llama.LlamaAdapter", "path": str(source)}
    slim = named.slim(teacher, groups, keep)
    save_model(target, slim, adapter=named, adapter_spec=spec, teacher=teacher, groups=groups, keep=keep)
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("choose", [two_thirds, ragged])
def test_what_was_finetuned_in_float32_from_a_bfloat16_checkpoint_stays_float32(choose, build_model, tmp_path):
    _, model = build_model("gqa4")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    named = LlamaAdapter(path=str(tmp_path / "source"))
    teacher = named.teacher()
    assert {tensor.dtype for tensor in teacher.parameters()} == {torch.float32}
    groups = named.groups(teacher)
    slim = named.slim(teacher, groups, choose([*groups]))
    with torch.no_grad():
        for tensor in slim.parameters():
            tensor.add_(1e-4)
    save_folder(tmp_path / "slim", slim, torch.float32)
    state = load_file(tmp_path / "slim" / WEIGHTS)
    assert all(torch.equal(state[name], tensor) for name, tensor in slim.state_dict().items() if name in state)


@pytest.mark.parametrize("choose", [two_thirds, ragged])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_configuration_has_head_dim(family, choose, save):
    folder, _, slim = save(family, choose, branches=choose is ragged)
    record = json.loads((folder / "config.json").read_text())
    assert record["head_dim"] == (8 if family == "qwen3" else 6) == slim.config.head_dim
    assert record["hidden_size"] == slim.config.hidden_size
    assert read_config(folder).head_dim == record["head_dim"]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_head_dim_a_folder_is_refused(family, save):
    """transformers would rebuild it as hidden_size // heads, without a warning."""
    folder, _, _ = save(family, two_thirds)
    change_config(folder, lambda record: record.pop("head_dim"))
    with pytest.raises(
        ValueError,
        match=rf"{folder}.*((_proj|_norm)\.\w+ is \(.*\) in the file|head_dim.*; copy (or export )?it again)",
    ):
        hawada.load(folder)


def poison(state):
    state[DOWN][0, 0] = torch.nan


DAMAGES = {
    "missing": (lambda state: state.pop(DOWN), rf"lacks tensors for .*: {DOWN}; copy or download"),
    "surplus": (lambda state: state.update(odd=torch.zeros(1)), r"has unexpected tensors for .*: odd; copy or downl"),
    "shape": (
        lambda state: state.update({DOWN: state[DOWN][:, 1:].contiguous()}),
        rf"{DOWN} is \(.*\) in the file, \(.*\) by config\.json",
    ),
    "nan": (poison, rf"{DOWN} is not finite"),
}


@pytest.mark.parametrize("choose", [two_thirds, ragged])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused(damage, choose, save):
    folder, _, _ = save("gqa4", choose, branches=choose is ragged)
    change, message = DAMAGES[damage]
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        hawada.load(folder)


def test_weights_that_changed_since_are_refused_first(save):
    folder, _, _ = save("gqa4", two_thirds)
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors does not match the checksum in hawada\.json"):
        load_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["slim"]["widths"][1].update(num_attention_heads=7),
        lambda record: record["slim"]["widths"][1].update(intermediate_size=11),
        lambda record: record["slim"]["widths"][1].update(mlp=False),
        lambda record: record["slim"]["widths"].pop(),
    ],
    ids=["heads", "neurons", "branch", "layers"],
)
def test_widths_that_do_not_fit_the_weights_are_refused(change, save):
    folder, _, _ = save("gqa4", ragged, branches=True)
    change_config(folder, change)
    with pytest.raises(ValueError, match=str(folder)):
        hawada.load(folder)


def test_configurations_of_ragged_heads_are_checked_layer_by_layer(save):
    folder, _, _ = save("gqa4", ragged, branches=True)
    change_config(folder, lambda record: record["slim"]["widths"][1].update(num_attention_heads=7))
    with pytest.raises(ValueError, match="7 query heads cannot be shared equally by 2 KV heads"):
        hawada.load(folder)


def test_the_original_is_not_touched(build_model, random_units):
    adapter, teacher = build_model("gqa4", branches=True)
    groups, state, config = adapter.groups(teacher), copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    slim = adapter.slim(teacher, groups, random_units(groups, 1))
    with torch.no_grad():
        for tensor in slim.parameters():
            tensor.zero_()
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in state.items())
    assert teacher.config.to_dict() == config and slim.config is not teacher.config


def test_a_gated_model_is_sliced_without_its_gates(build_model, random_units):
    adapter, teacher = build_model("gqa4")
    groups, inputs = adapter.groups(teacher), adapter.example_inputs(SHAPE)
    keep = random_units(groups, 1)
    expected = adapter.slim(teacher, groups, keep)
    student = Student(teacher, groups)
    slim = adapter.slim(student.model, groups, keep)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in slim.modules())
    with torch.no_grad():
        assert torch.equal(slim(*inputs).logits, expected(*inputs).logits)


def test_layers_that_stay_are_counted_anew(build_model):
    adapter, teacher = build_model("gqa4")
    groups = adapter.groups(teacher)
    edits = plan_edits(teacher, groups, completed({"model.layers.1": ()}, groups))
    layers = [f"model.layers.{index}" for index in range(3)]
    state = slim_state(teacher, edits, layers)
    assert {name.split(".")[2] for name in state if "layers" in name} == {"0", "1"}
    assert torch.equal(state[DOWN], teacher.model.layers[2].mlp.down_proj.weight)
    slim = adapter.slim(teacher, groups, completed({"model.layers.1": ()}, groups))
    assert [layer.self_attn.layer_idx for layer in slim.model.layers] == [0, 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("branches", [False, True])
def test_a_timed_site_is_the_module_of_the_exported_model(family, branches, build_model, random_units):
    adapter, teacher = build_model(family, branches=branches)
    groups, layers = adapter.groups(teacher), [f"{adapter.layers}.{index}" for index in range(3)]
    branch_names = {group.name for group in groups if group.removes}
    gone = {f"{layers[0]}.mlp": ()} if branches else {layers[0]: ()}
    for keep in (random_units(groups, 4), completed(gone, groups), keep_all(groups)):
        slim = adapter.slim(teacher, groups, keep)
        edits = plan_edits(teacher, groups, keep)
        for site in adapter.sites(teacher):
            alone = adapter.slice_site(teacher, groups, keep, site.module)
            path = slim_name(site.module, edits, layers)
            if path is None:
                assert type(alone) is nn.Identity
                assert any(not keep[name] for name in site.groups if name in branch_names)
                continue
            whole = slim.get_submodule(path)
            assert repr(alone) == repr(whole) and not alone.training
            assert list(alone.state_dict()) == list(whole.state_dict())
            assert all(torch.equal(alone.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
            assert getattr(alone, "layer_idx", None) == getattr(whole, "layer_idx", None)


def test_a_configuration_that_does_not_describe_the_tensors_is_an_error(build_model):
    adapter, teacher = build_model("gqa4")
    groups = adapter.groups(teacher)
    layers = [f"model.layers.{index}" for index in range(3)]
    state = slim_state(teacher, plan_edits(teacher, groups, two_thirds(groups)), layers)
    with pytest.raises(
        RuntimeError, match=r"the slim configuration does not describe model\.embed_tokens\.weight: the"
    ):
        build_filled(teacher.config, adapter.auto, state, teacher)


def test_generation_settings_go_along(build_model):
    adapter, teacher = build_model("gqa4")
    teacher.generation_config.repetition_penalty = 1.25
    groups = adapter.groups(teacher)
    for choose in (two_thirds, ragged):
        assert adapter.slim(teacher, groups, choose(groups)).generation_config.repetition_penalty == 1.25


@pytest.mark.parametrize("choose", [two_thirds, ragged])
def test_a_slim_model_trains(choose, build_model):
    adapter, teacher = build_model("gqa4", branches=choose is ragged)
    groups, (inputs,) = adapter.groups(teacher), adapter.example_inputs(SHAPE)
    slim = adapter.slim(teacher, groups, choose(groups)).train()
    slim(inputs).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())


# Distillation


def losses_and_gradients(distillation, student, teacher, inputs, labels):
    with torch.no_grad():
        taught = distillation.outputs_of(teacher, inputs)
    student.zero_grad()
    losses = distillation.losses(distillation.outputs_of(student, inputs), taught, labels)
    sum(losses.values()).backward()
    gradients = [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]
    return {name: loss.detach() for name, loss in losses.items()}, gradients


@pytest.mark.parametrize("kind", ["student", "slim"])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_losses_in_chunks_are_the_plain_losses(kind, chunk, build_model, random_units):
    adapter, teacher = build_model("gqa4")
    groups, (inputs,) = adapter.groups(teacher), adapter.example_inputs(SHAPE)
    keep = random_units(groups, 3)
    labels = inputs.roll(-1, 1).masked_fill(torch.arange(12) > 9, IGNORED)
    if kind == "slim":
        student = adapter.slim(teacher, groups, keep)
    else:
        student = Student(copy.deepcopy(teacher), groups)
        with torch.no_grad():
            for gate in student.gates:
                gate.theta.normal_(1.0, 1.0)
    options = {
        "outputs": adapter.outputs,
        "hidden_weight": 0.5,
        "label_weight": 0.25,
        "alignment": adapter.alignment(groups, keep if kind == "slim" else keep_all(groups)),
    }
    (plain, expected), (chunked, found) = (
        losses_and_gradients(
            Distillation(KDConfig(mse_weight=0.1), chunk=size, **options), student, teacher, inputs, labels
        )
        for size in (None, chunk)
    )
    assert set(plain) == set(chunked) == {"kd", "hidden", "label"}
    for name, loss in plain.items():
        assert torch.allclose(chunked[name], loss, rtol=1e-5)
    assert len(found) == len(expected) > 0
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("family", ["gqa4", "smollm3", "vit"])
@pytest.mark.parametrize("branches", [False, True])
def test_hidden_states_line_up_with_those_of_the_gated_model(family, branches, build_model, random_units):
    """Whatever goes, the last layer too: a slim model's states are those of its hard-gated twin."""
    adapter, teacher = build_model(family, branches=branches)
    groups, (inputs,) = adapter.groups(teacher), adapter.example_inputs(SHAPE)
    layers = [group.name for group in groups if group.kind == "layer"]
    student = Student(copy.deepcopy(teacher), groups)
    keeps = [completed({layer: (), "stream": (0, 2, 3, 5, 11, 13, 17, 40)}, groups) for layer in layers]
    for keep in [*keeps, *(random_units(groups, seed) for seed in range(5))]:
        slim, alignment = adapter.slim(teacher, groups, keep), adapter.alignment(groups, keep)
        with torch.no_grad(), student.hard_gated(keep):
            whole = adapter.outputs(student, inputs, hidden=True).hidden
        with torch.no_grad():
            own = adapter.outputs(slim, inputs, hidden=True).hidden
        assert len(own) == slim.config.num_hidden_layers + 1 == len(alignment.states)
        assert own[0].shape[-1] == len(keep["stream"]) and whole[0].shape[-1] == 48
        assert float(hidden_mse(own, whole, alignment)) < 1e-9


def test_without_a_stream_group_all_units_count(build_model):
    adapter, teacher = build_model("gqa4", stream=False)
    groups = adapter.groups(teacher)
    alignment = adapter.alignment(groups, completed({"model.layers.0": ()}, groups))
    assert alignment.units is None and alignment.states == (0, 2, 3)


def test_features_and_head_make_the_logits(build_model, random_units):
    adapter, teacher = build_model("qwen2")
    groups, (inputs,) = adapter.groups(teacher), adapter.example_inputs(SHAPE)
    for model in (teacher, adapter.slim(teacher, groups, random_units(groups, 2)), Student(teacher, groups)):
        with torch.no_grad():
            outputs = adapter.outputs(model, inputs, features=True)
            assert outputs.logits is None and outputs.hidden == () and isinstance(outputs.head, nn.Linear)
            assert torch.allclose(outputs.head(outputs.features), adapter.outputs(model, inputs).logits, atol=1e-4)
