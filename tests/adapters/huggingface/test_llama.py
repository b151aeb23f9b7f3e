import copy

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM, MistralForCausalLM

from hawada.adapters import Shape
from hawada.adapters.huggingface import CACHE_NAME, LlamaAdapter
from hawada.core.evaluate import compare_outputs, count_parameters
from hawada.core.gates import Student
from hawada.core.structure import check_groups, completed, keep_all, plan_edits, widths_of

FAMILIES = ["mha", "gqa4", "gqa8", "mistral", "qwen2", "qwen3", "smollm3"]
STOCK = {"mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
TEXT = Shape(2, "forward", 12, 4)


def generate(model, inputs, *, use_cache=True, count=8):
    """Greedy tokens, (batch, count)."""
    given = {"attention_mask": torch.ones_like(inputs), "pad_token_id": 0, "use_cache": use_cache}
    tokens = model.generate(inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, **given)
    return tokens[:, inputs.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_hard_gated_equals_sliced(family, build_model, random_units):
    kinds, removed, removable = set(), set(), set()
    for branches in (False, True):
        adapter, teacher = build_model(family, branches=branches)
        groups, inputs = adapter.groups(teacher), adapter.example_inputs(TEXT)
        student = Student(copy.deepcopy(teacher), groups)
        removable |= {group.name for group in groups if group.removes}
        for seed in range(10):
            keep = random_units(groups, seed, uniform=not branches and seed % 2 == 0)
            removed |= {name for name in removable if name in keep and not keep[name]}
            slim = adapter.slim(teacher, groups, keep)
            kinds.add(type(slim).__name__)
            with torch.no_grad(), student.hard_gated(keep):
                found = compare_outputs(adapter.logits(student(*inputs)), adapter.logits(slim(*inputs)))
            assert found["max_abs_diff"] <= 1e-5 * found["max_abs_logit"]
            assert not slim.training and {tensor.dtype for tensor in slim.parameters()} == {torch.float32}
    stock = STOCK.get(family, "Llama")
    assert kinds & {f"{stock}ForCausalLM", "MistralForCausalLM"} and f"Slim{stock}ForCausalLM" in kinds
    assert removed == removable


@pytest.mark.parametrize("family", FAMILIES)
def test_gated_and_slim_generate_the_same_with_and_without_cache(family, build_model, random_units):
    for seed, branches, uniform in ((0, False, True), (1, False, False), (2, True, False)):
        adapter, teacher = build_model(family, branches=branches)
        groups, (inputs,) = adapter.groups(teacher), adapter.example_inputs(TEXT)
        keep = random_units(groups, seed, uniform=uniform)
        slim, student = adapter.slim(teacher, groups, keep), Student(copy.deepcopy(teacher), groups)
        with torch.no_grad(), student.hard_gated(keep):
            expected = generate(student.model, inputs)
        assert torch.equal(generate(slim, inputs, use_cache=True), expected)
        assert torch.equal(generate(slim, inputs, use_cache=False), expected)
        assert torch.equal(adapter.greedy_tokens(slim, (inputs,), 8), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_attach_then_detach_is_bit_identical(family, build_model):
    adapter, teacher = build_model(family, branches=True)
    inputs, state = adapter.example_inputs(TEXT), copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        expected = teacher(*inputs).logits
        with Student(teacher, adapter.groups(teacher)) as student:
            assert list(teacher.state_dict()) == list(state)
            assert not torch.equal(student(*inputs).logits, expected)
        assert torch.equal(teacher(*inputs).logits, expected)
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_the_teacher(family, build_model):
    adapter, teacher = build_model(family)
    groups, inputs = adapter.groups(teacher), adapter.example_inputs(TEXT)
    slim = adapter.slim(teacher, groups, keep_all(groups))
    assert type(slim) is type(teacher) and list(slim.state_dict()) == list(teacher.state_dict())
    with torch.no_grad():
        assert torch.equal(slim(*inputs).logits, teacher(*inputs).logits)


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("mha", {"layer": 3, "kv_head": 3, "ffn": 3, "stream": 1}),
        ("gqa4", {"layer": 3, "kv_head": 3, "query_head": 3, "ffn": 3, "stream": 1}),
        ("gqa8", {"layer": 3, "kv_head": 3, "query_head": 3, "ffn": 3, "stream": 1}),
    ],
)
@pytest.mark.parametrize("branches", [False, True])
def test_every_layer_has_its_groups_and_sites(family, counts, branches, build_model):
    adapter, teacher = build_model(family, branches=branches)
    groups, sites = adapter.groups(teacher), adapter.sites(teacher)
    check_groups(groups, teacher)
    kinds = [group.kind for group in groups]
    assert {kind: kinds.count(kind) for kind in kinds} == counts | ({"attention": 3, "mlp": 3} if branches else {})
    touched = {name for site in sites for name in site.groups}
    assert touched == {group.name for group in groups}  # the stream's width changes every site's time too
    parents = {group.name: group.parent for group in groups}
    for site in sites:
        seen = set()
        for name in site.groups:
            assert parents[name] is None or parents[name] in seen
            seen.add(name)


def test_sites_come_in_order_of_execution(build_model):
    adapter, teacher = build_model("gqa4")
    sites, order = adapter.sites(teacher), []
    for site in sites:
        teacher.get_submodule(site.module).register_forward_hook(lambda *_, path=site.module: order.append(path))
    teacher(*adapter.example_inputs(TEXT))
    assert order == [site.module for site in sites]


def test_the_width_of_query_heads_counts_them_for_one_kv_head(build_model):
    adapter, teacher = build_model("gqa4")
    groups = adapter.groups(teacher)
    attention = "model.layers.0.self_attn"
    keep = completed({f"{attention}.kv": (1,), f"{attention}.query": (4, 6, 7)}, groups)
    assert widths_of(keep, groups)[f"{attention}.query"] == 3
    slim = adapter.slim(teacher, groups, keep)
    module = slim.get_submodule(attention)
    assert module.q_proj.weight.shape == (18, 48) and module.k_proj.weight.shape == (6, 48)
    assert module.num_key_value_groups == 3
    rows = teacher.get_submodule(attention).q_proj.weight[[*range(24, 30), *range(36, 48)]]
    assert torch.equal(module.q_proj.weight, rows)


@pytest.mark.parametrize(
    "query", [(0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3)], ids=["7 heads on 2 KV heads", "a KV head without query heads"]
)
def test_query_heads_that_are_not_shared_equally_are_refused(query, build_model):
    """transformers' configurations take them, and their attention then reads the wrong keys or none."""
    adapter, teacher = build_model("gqa4")
    groups, name = adapter.groups(teacher), "model.layers.1.self_attn.query"
    keep = keep_all(groups) | {name: query}
    message = rf"{name}: {len(query)} units cannot be shared equally among the units of model\.layers\.1\.self_attn\.kv"
    for attempt in (
        lambda: widths_of(keep, groups),
        lambda: plan_edits(teacher, groups, keep),
        lambda: adapter.slim(teacher, groups, keep),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


@pytest.mark.parametrize("branches", [False, True])
def test_tied_embeddings_are_cut_once_and_stay_one_tensor(branches, build_model, random_units):
    adapter, teacher = build_model("gqa4", branches=branches)
    groups = adapter.groups(teacher)
    keep = random_units(groups, 3)
    slim = adapter.slim(teacher, groups, keep)
    assert slim.lm_head.weight is slim.model.embed_tokens.weight
    assert torch.equal(slim.lm_head.weight, teacher.lm_head.weight[:, list(keep["stream"])])
    assert count_parameters(slim) < sum(tensor.numel() for tensor in slim.state_dict().values())
    assert teacher.lm_head.weight is teacher.model.embed_tokens.weight and teacher.lm_head.weight.shape[1] == 48


@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (0, 2, 3)])
def test_a_llama_whose_heads_do_not_divide_its_stream_becomes_a_mistral(heads, build_model):
    adapter, teacher = build_model("mha", hidden_size=40, head_dim=6, num_key_value_heads=8)
    groups = adapter.groups(teacher)
    keep = completed({group.name: heads for group in groups if group.kind == "kv_head"}, groups)
    slim = adapter.slim(teacher, groups, keep)
    assert type(slim) is (LlamaForCausalLM if len(heads) == 4 else MistralForCausalLM)
    assert slim.config.head_dim == 6 and slim.config.num_attention_heads == len(heads)
    if len(heads) == 3:
        assert slim.config.sliding_window is None


SLIDING = {"use_sliding_window": True, "sliding_window": 4}
PER_LAYER = [
    ("qwen2", SLIDING, "layer_types", ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]),
    ("qwen3", SLIDING, "layer_types", ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]),
    ("smollm3", {}, "no_rope_layers", [1, 0, 0, 1]),
    ("smollm3", SLIDING, "layer_types", ["full_attention", "full_attention", "sliding_attention", "full_attention"]),
]


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(("family", "options", "key", "entries"), PER_LAYER)
def test_lists_with_an_entry_a_layer_lose_those_of_dropped_layers(family, options, key, entries, uniform, build_model):
    adapter, teacher = build_model(family, **options, num_hidden_layers=4, **{key: entries})
    groups, (inputs,) = adapter.groups(teacher), adapter.example_inputs(TEXT)
    dropped = {"model.layers.1": ()} if uniform else {"model.layers.1": (), "model.layers.3.ffn": (5, 7)}
    keep = completed(dropped, groups)
    slim = adapter.slim(teacher, groups, keep)
    assert getattr(slim.config, key) == [entries[0], *entries[2:]]
    assert slim.config.model_type == (family if uniform else f"slim_{family}")
    student = Student(copy.deepcopy(teacher), groups)
    with torch.no_grad(), student.hard_gated(keep):
        found = compare_outputs(student(inputs).logits, slim(inputs).logits)
    assert found["max_abs_diff"] <= 1e-5 * found["max_abs_logit"]
    assert torch.equal(generate(slim, inputs), generate(slim, inputs, use_cache=False))


def test_lists_that_happen_to_be_as_long_as_the_model_is_deep_stay(build_model):
    adapter, teacher = build_model("gqa4", eos_token_id=[1, 2, 3])
    groups = adapter.groups(teacher)
    slim = adapter.slim(teacher, groups, completed({"model.layers.1": ()}, groups))
    assert slim.config.num_hidden_layers == 2 and slim.config.eos_token_id == [1, 2, 3]


@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("first", ["full_attention", "sliding_attention"])
def test_caches_work_whichever_attentions_are_gone(gone, first, build_model):
    """Caches tell their length by their first entry of each kind, which a removed attention would leave empty."""
    other = "sliding_attention" if first == "full_attention" else "full_attention"
    adapter, teacher = build_model("qwen2", branches=True, **SLIDING, layer_types=[first, other, first])
    groups, (inputs,) = adapter.groups(teacher), adapter.example_inputs(TEXT)
    keep = completed({f"model.layers.{index}.attention": () for index in gone}, groups)
    slim, student = adapter.slim(teacher, groups, keep), Student(copy.deepcopy(teacher), groups)
    with torch.no_grad(), student.hard_gated(keep):
        expected = generate(student.model, inputs)
    for use_cache in (True, False):
        assert torch.equal(generate(slim, inputs, use_cache=use_cache), expected)
    with torch.no_grad():
        cache, whole = DynamicCache(config=slim.config), slim(inputs).logits
        steps = [slim(inputs[:, index : index + 1], **{CACHE_NAME: cache}).logits for index in range(inputs.shape[1])]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("family", ["gqa4", "smollm3"])
def test_a_slim_model_can_be_pruned_again(family, build_model, random_units):
    adapter, teacher = build_model(family, branches=True)
    groups, inputs = adapter.groups(teacher), adapter.example_inputs(TEXT)
    keep = completed({"model.layers.1.attention": (), "model.layers.2.ffn": (3, 4, 5, 9)}, groups)
    slim = adapter.slim(teacher, groups, keep)
    fewer = adapter.groups(slim)
    names = {group.name for group in fewer}
    assert "model.layers.0.attention" in names and not {"model.layers.1.attention", "model.layers.1.mlp"} & names
    for seed in range(3):
        keep = random_units(fewer, seed)
        slimmer = adapter.slim(slim, fewer, keep)
        with torch.no_grad(), Student(copy.deepcopy(slim), fewer).hard_gated(keep) as student:
            found = compare_outputs(student(*inputs).logits, slimmer(*inputs).logits)
        assert found["max_abs_diff"] <= 1e-5 * found["max_abs_logit"]


def test_a_uniform_layout_has_no_single_branches(build_model):
    adapter, teacher = build_model("gqa4", branches=True)
    groups = adapter.groups(teacher)
    with pytest.raises(
        ValueError, match=r"uniform cannot leave out single branches \(model\.layers\.0\.attention …\); set model\.adap"
    ):
        adapter.check_layout("uniform", groups)
    adapter.check_layout("heterogeneous", groups)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_uniform_llama_has_no_biases(bias, build_model):
    adapter, teacher = build_model("mha", **{bias: True})
    groups = adapter.groups(teacher)
    with pytest.raises(ValueError, match=r"export\.layout: uniform would need the heads of a llama with biases to div"):
        adapter.check_layout("uniform", groups)
    adapter.check_layout("heterogeneous", groups)


@pytest.mark.parametrize("family", ["mha", "mistral", "qwen2", "qwen3", "smollm3"])
def test_without_branches_and_biases_both_layouts_will_do(family, build_model):
    adapter, teacher = build_model(family)
    for layout in ("uniform", "heterogeneous"):
        adapter.check_layout(layout, adapter.groups(teacher))
    with pytest.raises(ValueError, match=r"export\.layout: onnx is not a layout of LlamaAdapter; it has uniform, het"):
        adapter.check_layout("onnx", adapter.groups(teacher))


def test_shapes_that_the_model_does_not_take_are_refused(build_model):
    adapter, _ = build_model("gqa4")
    adapter.check_shape(Shape(1, "generate", 250, 6))
    with pytest.raises(ValueError, match=r"budget\.phase: forward is not a phase of LlamaAdapter; it has prefill, dec"):
        adapter.check_shape(Shape(1, "forward"))
    with pytest.raises(ValueError, match=r"budget\.prompt: 250 tokens and budget\.new_tokens 7 exceed the 256 positio"):
        adapter.check_shape(Shape(1, "prefill", 250, 7))


def test_example_inputs_are_always_the_same(build_model):
    adapter, _ = build_model("gqa4")
    for phase, length in (("prefill", 12), ("generate", 12), ("decode", 1)):
        (first,), (again,) = (adapter.example_inputs(Shape(3, phase, 12, 4)) for _ in range(2))
        assert first.shape == (3, length) and torch.equal(first, again) and int(first.max()) < 97


def test_without_checkpoint_there_is_no_teacher(build_model):
    adapter, _ = build_model("gqa4")
    for method in (adapter.teacher, adapter.check_teacher):
        with pytest.raises(ValueError, match=r"model\.path: no checkpoint is given; set model\.path to a repository"):
            method()


def test_a_saved_checkpoint_is_a_teacher_with_its_own_tokenizer(build_model, tmp_path):
    adapter, model = build_model("gqa4")
    model.save_pretrained(tmp_path)
    adapter.tokenizer().save_pretrained(tmp_path)
    named = LlamaAdapter(path=str(tmp_path))
    named.check_teacher()
    inputs = named.example_inputs(TEXT)
    with torch.no_grad():
        assert torch.allclose(named.teacher()(*inputs).logits, model(*inputs).logits, atol=1e-4)
    assert named.tokenizer()("bytes")["input_ids"] == adapter.tokenizer()("bytes")["input_ids"]


TEXTS = [
    "",
    " ",
    "a",
    "Hello , world .  Don't  strip \n\n\t me !",
    "naïve 東京 🙂👩\u200d🚀 \x00\x01\x7f e\u0301",
    "".join(map(chr, range(0x800))),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The byte tokenizer, and what comes back from its files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = LlamaAdapter(config={"model_type": "llama"}).tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_every_byte_is_one_token_and_every_text_comes_back(text, tokenizers):
    ids = [tokenizer(text)["input_ids"] for tokenizer in tokenizers]
    assert ids[0] == ids[1] and len(ids[0]) == len(text.encode())
    assert [tokenizer.decode(ids[0]) for tokenizer in tokenizers] == [text, text]


def test_the_byte_tokenizer_has_a_token_for_each_byte_and_one_that_ends_a_text(tokenizers):
    for tokenizer in tokenizers:
        assert len(tokenizer) == 257
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == 256
        assert (
            tokenizer.decode([256]) == tokenizer.eos_token and tokenizer.decode([256], skip_special_tokens=True) == ""
        )
        assert tokenizer("a")["input_ids"] != tokenizer("b")["input_ids"]
