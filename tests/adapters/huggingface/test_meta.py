"""Counts, widths and slices of the real architectures on the meta device, without weights."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM, MistralForCausalLM, ViTForImageClassification

from hawada.adapters import Shape
from hawada.adapters.huggingface import LlamaAdapter, ViTAdapter
from hawada.core.evaluate import count_macs, count_parameters
from hawada.core.latency import Rounds, SimulatedClock, build_table
from hawada.core.structure import ExportPolicy, Rounding, check_groups, full_widths, keep_first

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
VIT = {
    "model_type": "vit",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "num_labels": 1000,
    "layer_norm_eps": 1e-12,
}
POLICY = ExportPolicy(rounding={"ffn": Rounding(256), "stream": Rounding(128)})


def on_meta(adapter):
    """Return the adapter, its skeleton without weights, and the groups."""
    with torch.device("meta"):
        model = adapter.skeleton()
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    groups = adapter.groups(model)
    check_groups(groups, model)
    return adapter, model, groups


@pytest.fixture(scope="module")
def llama():
    return on_meta(LlamaAdapter(config=LLAMA, stream=True))


@pytest.fixture(scope="module")
def vit():
    return on_meta(ViTAdapter(config=VIT, stream=True))


def slices(loaded, widths, dropped=()):
    """Make the slim model that has these widths by kind, without some layers."""
    adapter, model, groups = loaded
    target_widths = full_widths(groups) | {group.name: widths[group.kind] for group in groups if group.kind in widths}
    target_widths |= dict.fromkeys(dropped, 0)
    last_first = {group.name: range(group.units)[::-1] for group in groups}
    return adapter.slim(model, groups, keep_first(groups, target_widths, last_first))


def shapes(model, *names):
    return [tuple(model.get_parameter(name).shape) for name in names]


def units_by_kind(groups):
    kinds = [group.kind for group in groups]
    return {group.kind: (kinds.count(group.kind), group.units, group.full_width) for group in groups}


def test_groups_of_llama_3_2_1b(llama):
    _, model, groups = llama
    assert type(model) is LlamaForCausalLM and count_parameters(model) == 1_235_814_400
    assert units_by_kind(groups) == {
        "layer": (16, 1, 1),
        "kv_head": (16, 8, 8),
        "query_head": (16, 32, 4),
        "ffn": (16, 8192, 8192),
        "stream": (1, 2048, 2048),
    }
    adapter = llama[0]
    assert len(adapter.sites(model)) == 33  # two a layer, and the output layer
    assert {site.kind: site.groups for site in adapter.sites(model)[:2]} == {
        "self_attn": ("model.layers.0", "model.layers.0.self_attn.kv", "model.layers.0.self_attn.query", "stream"),
        "mlp": ("model.layers.0", "model.layers.0.ffn", "stream"),
    }


def test_groups_of_vit_base(vit):
    adapter, model, groups = vit
    assert type(model) is ViTForImageClassification and count_parameters(model) == 86_567_656
    assert units_by_kind(groups) == {
        "layer": (12, 1, 1),
        "head": (12, 12, 12),
        "ffn": (12, 3072, 3072),
        "stream": (1, 768, 768),
    }
    assert len(adapter.sites(model)) == 24
    assert count_macs(model, (torch.empty(1, 3, 224, 224, device="meta"),)) == pytest.approx(17.5e9, rel=0.01)


def test_widths_under_the_rounding_of_an_accelerator(llama, vit):
    for (_, _, groups), heads in ((llama, "kv_head"), (vit, "head")):
        widths = {group.kind: POLICY.widths(group) for group in groups}
        full = {group.kind: group.full_width for group in groups}
        assert widths["layer"] == [0, 1]
        assert widths[heads] == list(range(1, full[heads] + 1))
        assert widths["ffn"] == list(range(256, full["ffn"] + 1, 256))
        assert widths["stream"] == list(range(128, full["stream"] + 1, 128))
    assert POLICY.widths(next(group for group in llama[2] if group.kind == "query_head")) == [1, 2, 3, 4]


ATTENTION = tuple(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo")
MLP = tuple(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


def test_slices_of_llama_3_2_1b(llama):
    widths = {"kv_head": 6, "query_head": 3, "ffn": 5120, "stream": 1536}
    slim = slices(llama, widths, dropped=("model.layers.5", "model.layers.15"))
    stream, heads, kv = 1536, 18 * 64, 6 * 64
    assert shapes(slim, *ATTENTION) == [(heads, stream), (kv, stream), (kv, stream), (stream, heads)]
    assert shapes(slim, *MLP) == [(5120, stream), (5120, stream), (stream, 5120)]
    assert shapes(slim, "model.embed_tokens.weight", "model.norm.weight") == [(128256, stream), (stream,)]
    assert len(slim.model.layers) == 14 and slim.lm_head.weight is slim.model.embed_tokens.weight
    layer = 2 * stream * (heads + kv) + 3 * stream * 5120 + 2 * stream
    assert count_parameters(slim) == 128256 * stream + 14 * layer + stream
    assert {tensor.device.type for tensor in slim.parameters()} == {"meta"}
    config = slim.config
    assert type(slim) is MistralForCausalLM and config.sliding_window is None  # 18 heads do not divide 1536
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (1536, 18, 6)
    assert (config.head_dim, config.intermediate_size, config.num_hidden_layers) == (64, 5120, 14)
    assert config.rope_parameters == LLAMA["rope_parameters"] and config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings and config.max_position_embeddings == 131072 and config.eos_token_id == 128001


def test_a_slim_llama_stays_a_llama_where_its_heads_divide_the_stream(llama):
    slim = slices(llama, {"kv_head": 4, "query_head": 4})
    assert type(slim) is LlamaForCausalLM and slim.config.head_dim == 64
    assert count_parameters(slim) == 1_235_814_400 - 16 * 2 * 2048 * (16 + 4) * 64


def test_one_narrow_layer_makes_a_llama_heterogeneous(llama):
    slim = slices(llama, {}, dropped=("model.layers.0",))
    assert type(slim) is LlamaForCausalLM
    adapter, model, groups = llama
    widths = full_widths(groups) | {"model.layers.3.ffn": 256}
    slim = adapter.slim(model, groups, keep_first(groups, widths))
    assert type(slim).__name__ == "SlimLlamaForCausalLM"
    assert shapes(slim, "model.layers.3.mlp.up_proj.weight", MLP[0]) == [(256, 2048), (8192, 2048)]
    assert count_parameters(slim) == 1_235_814_400 - 3 * 2048 * (8192 - 256)


def test_slices_of_vit_base(vit):
    slim = slices(vit, {"head": 7, "ffn": 1792, "stream": 640}, dropped=("vit.layers.0", "vit.layers.6"))
    stream, heads, ffn = 640, 7 * 64, 1792
    names = [f"vit.layers.0.attention.{name}_proj.weight" for name in "qkvo"]
    assert shapes(slim, *names) == [(heads, stream)] * 3 + [(stream, heads)]
    assert shapes(slim, "vit.layers.9.mlp.fc1.weight", "vit.layers.9.mlp.fc2.weight") == [(ffn, stream), (stream, ffn)]
    assert shapes(slim, "vit.embeddings.position_embeddings", "classifier.weight") == [(1, 197, stream), (1000, stream)]
    layer = 4 * stream * heads + 3 * heads + stream + 2 * stream * ffn + ffn + stream + 4 * stream
    embedding = stream * (1 + 197 + 3 * 16 * 16 + 1)
    assert count_parameters(slim) == embedding + 10 * layer + 2 * stream + 1000 * (stream + 1)
    config = slim.config
    assert type(slim) is ViTForImageClassification
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (640, 7, 64)
    assert (config.intermediate_size, config.num_hidden_layers) == (1792, 10)


class CountingClock:
    """A clock by which every call takes a millisecond; it records what it was asked to time."""

    simulated = True

    def __init__(self):
        self.prepared = []

    def prepare(self, model, inputs):
        assert {tensor.device.type for tensor in (*model.parameters(), *inputs)} == {"meta"}
        weights, given = ([tuple(x.shape) for x in tensors] for tensors in (model.parameters(), inputs))
        self.prepared.append((type(model.module).__name__, str(weights), str(given)))
        return lambda: 1.0


@pytest.mark.parametrize(
    ("phase", "stream", "distinct"),
    [
        ("prefill", True, 3),  # attention, MLP, output layer
        ("generate", False, 4),  # attention and MLP, with a prompt and with one token
    ],
)
def test_a_table_of_the_first_layers_of_llama_3_2_1b_times_identical_ones_once(phase, stream, distinct):
    adapter, model, groups = on_meta(LlamaAdapter(config=LLAMA | {"num_hidden_layers": 4}, stream=stream))
    shape, sites, clock = Shape(1, phase, 256, 4), adapter.sites(model), CountingClock()
    calls = [
        (times, workload, tuple(x.to("meta") for x in adapter.example_inputs(part)))
        for times, workload, part in adapter.parts(model, shape)
    ]
    table = build_table(
        model, groups, sites, calls, clock, policy=POLICY, points=2, rounds=Rounds(min_rounds=1, max_rounds=1)
    )
    assert len(table.sites) == len(sites) == (9 if stream else 8)
    assert len(clock.prepared) == len(set(clock.prepared))  # no slice of any layer was timed a second time
    grids = {entry.site.kind: entry.grid for entry in table.sites}  # layers share theirs
    slices = sum(math.prod(len(axis) for axis in grid if 0 not in axis) for grid in grids.values())
    assert len(clock.prepared) == len(calls) * slices
    assert len(calls) * len(grids) == distinct <= 12


def test_fewer_units_take_less_time_on_a_simulated_gpu(llama, vit):
    clock = SimulatedClock(tflops=312, gbps=2039, launch_us=0.1)
    narrow = {"kv_head": 4, "head": 6, "ffn": 2048, "stream": 512}
    for loaded, phases in ((llama, ("prefill", "decode")), (vit, ("forward",))):
        adapter, model, groups = loaded
        slim = slices(loaded, narrow)
        fewer = slices(loaded, narrow, dropped=[group.name for group in groups if group.kind == "layer"][:4])
        for phase in phases:
            shape = Shape(1, phase, 256, 4)
            inputs = adapter.example_inputs(shape)
            ms = [clock.prepare(adapter.workload(each, shape), inputs)() for each in (fewer, slim, model)]
            assert ms == sorted(ms) and ms[0] < ms[1] < ms[2]
