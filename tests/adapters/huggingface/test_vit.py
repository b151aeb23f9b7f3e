import copy

import pytest
import torch

from hawada.adapters import Shape
from hawada.core.evaluate import compare_outputs
from hawada.core.gates import Student
from hawada.core.structure import check_groups, completed, keep_all

IMAGES = Shape(3)


def test_hard_gated_equals_sliced(build_model, random_units):
    kinds, removed, removable = set(), set(), set()
    for branches in (False, True):
        adapter, teacher = build_model("vit", branches=branches)
        groups, inputs = adapter.groups(teacher), adapter.example_inputs(IMAGES)
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
    assert kinds == {"ViTForImageClassification", "SlimViTForImageClassification"}
    assert removed == removable


@pytest.mark.parametrize("gone", ["attention", "mlp"])
def test_a_network_without_any_attention_or_mlp_is_exact(gone, build_model):
    adapter, teacher = build_model("vit", branches=True)
    groups, inputs = adapter.groups(teacher), adapter.example_inputs(IMAGES)
    keep = completed({group.name: () for group in groups if group.kind == gone}, groups)
    slim = adapter.slim(teacher, groups, keep)
    with torch.no_grad(), Student(copy.deepcopy(teacher), groups).hard_gated(keep) as student:
        found = compare_outputs(student(*inputs).logits, slim(*inputs).logits)
    assert found["max_abs_diff"] <= 1e-5 * found["max_abs_logit"]


def test_attach_then_detach_is_bit_identical(build_model):
    adapter, teacher = build_model("vit", branches=True)
    inputs, state = adapter.example_inputs(IMAGES), copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        expected = teacher(*inputs).logits
        with Student(teacher, adapter.groups(teacher)) as student:
            assert list(teacher.state_dict()) == list(state)
            assert not torch.equal(student(*inputs).logits, expected)
        assert torch.equal(teacher(*inputs).logits, expected)
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in state.items())


def test_keeping_everything_is_the_teacher(build_model):
    adapter, teacher = build_model("vit")
    groups, inputs = adapter.groups(teacher), adapter.example_inputs(IMAGES)
    slim = adapter.slim(teacher, groups, keep_all(groups))
    assert type(slim) is type(teacher) and list(slim.state_dict()) == list(teacher.state_dict())
    with torch.no_grad():
        assert torch.equal(slim(*inputs).logits, teacher(*inputs).logits)


@pytest.mark.parametrize("branches", [False, True])
def test_every_layer_has_its_groups_and_sites(branches, build_model):
    adapter, teacher = build_model("vit", branches=branches)
    groups, sites = adapter.groups(teacher), adapter.sites(teacher)
    check_groups(groups, teacher)
    kinds = [group.kind for group in groups]
    expected = {"layer": 3, "head": 3, "ffn": 3, "stream": 1} | ({"attention": 3, "mlp": 3} if branches else {})
    assert {kind: kinds.count(kind) for kind in kinds} == expected
    assert {name for site in sites for name in site.groups} == {group.name for group in groups}
    order = []
    for site in sites:
        teacher.get_submodule(site.module).register_forward_hook(lambda *_, path=site.module: order.append(path))
    teacher(*adapter.example_inputs(IMAGES))
    assert order == [site.module for site in sites]


def test_the_stream_is_cut_wherever_it_flows(build_model):
    adapter, teacher = build_model("vit")
    groups = adapter.groups(teacher)
    slim = adapter.slim(teacher, groups, keep_all(groups) | {"stream": (1, 5, 40)})
    wide = [name for name, tensor in slim.state_dict().items() if 48 in tensor.shape and "proj" not in name]
    assert not wide and slim.config.hidden_size == 3
    assert slim.vit.embeddings.position_embeddings.shape == (1, 17, 3)
    assert slim.vit.embeddings.patch_embeddings.projection.weight.shape == (3, 3, 4, 4)
    assert slim.classifier.weight.shape == (5, 3)
    assert slim.vit.layers[0].attention.q_proj.weight.shape == (48, 3)  # the heads stayed


def test_layouts_and_phases_that_it_has_not(build_model):
    adapter, teacher = build_model("vit", branches=True)
    with pytest.raises(ValueError, match=r"uniform cannot leave out single branches \(vit\.layers\.0\.attention …\)"):
        adapter.check_layout("uniform", adapter.groups(teacher))
    adapter.check_shape(Shape(1, "forward"))
    with pytest.raises(ValueError, match=r"budget\.phase: decode is not a phase of ViTAdapter; it has forward"):
        adapter.check_shape(Shape(1, "decode"))
    with pytest.raises(ValueError, match=r"distill\.chunk: only language models are computed in chunks of tokens; set"):
        adapter.outputs(teacher, *adapter.example_inputs(IMAGES), features=True)
    with pytest.raises(ValueError, match=r"ViTAdapter takes no text; choose data= of the kind that the model takes"):
        adapter.tokenizer()
    assert adapter.greedy_tokens(teacher, adapter.example_inputs(IMAGES), 4) is None


def test_example_inputs_are_always_the_same(build_model):
    adapter, _ = build_model("vit")
    (first,), (again,) = adapter.example_inputs(IMAGES), adapter.example_inputs(IMAGES)
    assert first.shape == (3, 3, 16, 16) and torch.equal(first, again)
