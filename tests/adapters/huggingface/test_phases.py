import copy
import itertools

import numpy as np
import pytest
import torch

from hawada.adapters import Shape
from hawada.adapters.huggingface.phases import PinnedCache
from hawada.core.latency import Rounds, SimulatedClock, build_table
from hawada.core.structure import ExportPolicy, Rounding, completed

PROMPT, NEW = 12, 5
PHASES = ["prefill", "decode", "generate"]


def shape_of(phase, batch=2):
    return Shape(batch, phase, PROMPT, NEW)


@pytest.fixture(params=["gqa4", "mistral", "qwen2 without its first attention"])
def ready(request, build_model):
    """Return an adapter and a model: full or sliding windows, or a slim one with a cache entry that stays empty."""
    family = request.param.partition(" ")[0]
    if family != "qwen2":
        return build_model(family)
    types = ["full_attention", "sliding_attention", "full_attention"]
    options = {"use_sliding_window": True, "sliding_window": 4, "layer_types": types}
    adapter, teacher = build_model(family, branches=True, **options)
    groups = adapter.groups(teacher)
    return adapter, adapter.slim(teacher, groups, completed({"model.layers.0.attention": ()}, groups))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def test_prefill_returns_the_last_position_of_a_plain_forward_pass_every_time(ready):
    adapter, model = ready
    (inputs,) = adapter.example_inputs(shape_of("prefill"))
    workload = adapter.workload(model, shape_of("prefill"))
    expected = model(inputs).logits[:, -1:]
    first = workload(inputs).clone()
    assert first.shape == (2, 1, 97) and torch.allclose(first, expected, atol=1e-5 * float(expected.abs().max()))
    workload(inputs.flip(0))
    assert torch.equal(workload(inputs), first)


def test_decode_writes_at_one_position_of_a_cache_that_does_not_grow(ready):
    adapter, model = ready
    workload, (token,) = adapter.workload(model, shape_of("decode")), adapter.example_inputs(shape_of("decode"))
    for _ in range(3):
        assert workload(token).shape == (2, 1, 97)
        filled = [layer for layer in workload.cache.layers if layer.is_initialized]
        assert len(filled) == sum(hasattr(layer.self_attn, "layer_idx") for layer in model.model.layers)
        for layer in filled:
            assert layer.keys.shape[2] == PROMPT + NEW and layer.get_seq_length() == PROMPT
            assert layer.keys.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == [PROMPT]


def test_decode_goes_on_from_the_token_that_it_chose(ready):
    adapter, model = ready
    workload, (token,) = adapter.workload(model, shape_of("decode")), adapter.example_inputs(shape_of("decode"))
    logits = [workload(token).clone() for _ in range(3)]
    for chosen, follows in itertools.pairwise(logits):
        fresh = adapter.workload(model, shape_of("decode"))
        assert torch.equal(fresh(chosen.argmax(-1)), follows)


def test_generate_returns_the_tokens_of_transformers_every_time(ready):
    adapter, model = ready
    (inputs,) = adapter.example_inputs(shape_of("generate"))
    workload, expected = adapter.workload(model, shape_of("generate")), adapter.greedy_tokens(model, (inputs,), NEW)
    assert expected.shape == (2, NEW)
    assert torch.equal(workload(inputs), expected)
    workload(inputs.flip(0))
    assert torch.equal(workload(inputs), expected)


def test_a_copied_cache_starts_empty_so_that_a_slim_attention_allocates_its_own_width(build_model):
    adapter, teacher = build_model("gqa4")
    workload, (token,) = adapter.workload(teacher, shape_of("decode")), adapter.example_inputs(shape_of("decode"))
    workload(token)
    copied = copy.deepcopy(workload)
    assert not any(layer.is_initialized for layer in copied.cache.layers)
    assert [layer.get_seq_length() for layer in copied.cache.layers] == [PROMPT] * 3
    groups = adapter.groups(teacher)
    names = {group.name: (1,) for group in groups if group.kind == "kv_head"}
    copied.model = adapter.slim(teacher, groups, completed(names, groups))
    copied(token)
    assert {layer.keys.shape[1] for layer in copied.cache.layers} == {1}
    assert {layer.keys.shape[1] for layer in workload.cache.layers} == {2}


def test_a_pinned_cache_holds_zeros_before_its_position():
    cache = PinnedCache(1, 6, 4)
    keys = torch.ones(1, 2, 1, 3)
    for value in (1.0, 2.0):
        seen, _ = cache.update(value * keys, value * keys, 0)
        assert seen[0, 0, :, 0].tolist() == [0, 0, 0, 0, value, 0]


def test_generate_is_made_of_one_prefill_and_a_decode_for_every_further_token(build_model):
    adapter, teacher = build_model("gqa4")
    parts = adapter.parts(teacher, shape_of("generate"))
    assert [(times, type(call).__name__, part) for times, call, part in parts] == [
        (1.0, "Prefill", shape_of("prefill")),
        (NEW - 1.0, "Decode", shape_of("decode")),
    ]
    (alone,) = adapter.parts(teacher, Shape(2, "generate", PROMPT, 1))
    assert alone[0] == 1.0 and alone[2].phase == "prefill"
    for phase in ("prefill", "decode"):
        ((times, _, part),) = adapter.parts(teacher, shape_of(phase))
        assert times == 1.0 and part == shape_of(phase)


def test_the_simulated_clock_times_every_phase_before_and_after_it_ran(ready):
    adapter, model = ready
    ms = {}
    for phase in PHASES:
        workload, inputs = adapter.workload(model, shape_of(phase)), adapter.example_inputs(shape_of(phase))
        ms[phase] = SimulatedClock().prepare(workload, inputs)()
        workload(*inputs)
        assert SimulatedClock().prepare(workload, inputs)() == ms[phase]
    assert 0 < ms["decode"] < ms["generate"] and 0 < ms["prefill"] < ms["generate"]
    assert ms["generate"] == pytest.approx(ms["prefill"] + (NEW - 1) * ms["decode"], rel=0.1)


def time_sites(adapter, model, phase):
    groups = adapter.groups(model)
    calls = [(times, call, adapter.example_inputs(part)) for times, call, part in adapter.parts(model, shape_of(phase))]
    policy = ExportPolicy(rounding={"ffn": Rounding(8), "stream": Rounding(16)})
    clock = SimulatedClock(launch_us=0.5)
    return build_table(
        model,
        groups,
        adapter.sites(model),
        calls,
        clock,
        policy=policy,
        points=3,
        rounds=Rounds(min_rounds=1, max_rounds=1),
    )


@pytest.mark.parametrize("stream", [False, True])
def test_tables_of_sites_are_monotone_and_a_layer_that_is_gone_takes_no_time(stream, build_model):
    adapter, teacher = build_model("gqa4", num_hidden_layers=2, stream=stream)
    sums = {}
    for phase in PHASES:
        table = time_sites(adapter, teacher, phase)
        sums[phase] = np.asarray([site.ms.max() for site in table.sites])
        assert [site.site for site in table.sites] == adapter.sites(teacher)
        for site in table.sites:
            if site.site.kind != "head":
                layer = site.site.groups.index(site.site.module.rpartition(".")[0])
                assert (np.take(site.ms, 0, axis=layer) == 0).all() and (np.take(site.ms, 1, axis=layer) > 0).all()
            for axis in range(site.ms.ndim):
                assert (np.diff(site.ms, axis=axis) >= 0).all()
            assert site.ms.flat[-1] > site.ms[(1, *[0] * (site.ms.ndim - 1))]
    assert sums["generate"] == pytest.approx(sums["prefill"] + (NEW - 1) * sums["decode"])


def test_removed_branches_take_no_time(build_model):
    adapter, teacher = build_model("gqa4", num_hidden_layers=1, stream=False, branches=True)
    for site in time_sites(adapter, teacher, "decode").sites:
        assert site.ms.shape[:2] == (2, 2)
        assert (site.ms[0] == 0).all() and (site.ms[:, 0] == 0).all() and (site.ms[1, 1] > 0).all()
