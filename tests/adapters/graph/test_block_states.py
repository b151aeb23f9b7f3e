"""The outputs of residual blocks are hidden states that a student is distilled from."""

import pytest
import torch

from hawada.adapters import Shape
from hawada.adapters.graph import GraphAdapter
from hawada.adapters.torchvision import ResNetAdapter
from hawada.core.distill import Distillation, KDConfig, hidden_mse
from hawada.core.finetune import Finetuner, recalibrate_batchnorm
from hawada.core.gates import Student
from hawada.core.structure import keep_all

ADAPTERS = {
    "resnet": ResNetAdapter("basic", layers=[1, 2, 1, 1], num_classes=5, image_size=32),
    "convnet": GraphAdapter("mobilenet_v2", num_classes=5, image_size=32),
}


@pytest.fixture(params=ADAPTERS)
def family(request):
    """Return an adapter, its model and inputs."""
    torch.manual_seed(0)
    adapter = ADAPTERS[request.param]
    images = adapter.example_inputs(Shape(8))[0]
    model = recalibrate_batchnorm(
        adapter.skeleton(), [(images,)]
    )  # otherwise the outputs of untrained blocks are almost zero
    return adapter, model, images


def test_states_are_the_blocks_outputs(family):
    adapter, model, images = family
    found = adapter.outputs(model, images, hidden=True)
    assert torch.equal(found.logits, model(images)) and len(found.hidden) == len(adapter.blocks) >= 5
    seen = []
    handle = model.get_submodule(adapter.blocks[1]).register_forward_hook(lambda *call: seen.append(call[2]))
    model(images)
    handle.remove()
    assert torch.equal(found.hidden[1], seen[0])
    assert adapter.outputs(model, images).hidden == ()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_slim_model_has_the_same_states_up_to_the_first_that_changed(family):
    adapter, model, images = family
    groups = adapter.groups(model)
    removed = adapter.blocks[2]
    keep = keep_all(groups)
    for group in groups:
        if group.name.startswith(f"{removed}."):
            keep[group.name] = ()
    slim = adapter.slim(model, groups, keep)
    own, theirs = (adapter.outputs(each, images, hidden=True).hidden for each in (slim, model))
    assert [state.shape for state in own] == [state.shape for state in theirs]
    assert all(torch.allclose(own[index], theirs[index], atol=1e-5) for index in range(2))
    assert not torch.allclose(own[2], theirs[2], atol=1e-3)
    with Student(model, groups) as student:
        gated = adapter.outputs(student, images, hidden=True)
        assert len(gated.hidden) == len(theirs) and not torch.equal(gated.hidden[2], theirs[2])


def test_finetuning_on_states_draws_them_to_the_teachers(family):
    adapter, teacher, images = family
    groups = adapter.groups(teacher)
    keep = keep_all(groups)
    for group in groups:
        if group.name.startswith(f"{adapter.blocks[2]}."):
            keep[group.name] = ()
    slim = adapter.slim(teacher, groups, keep)

    def distance():
        slim.eval()
        with torch.no_grad():
            own, theirs = (adapter.outputs(each, images, hidden=True).hidden for each in (slim, teacher))
        return float(hidden_mse(own, theirs))

    before = distance()
    distillation = Distillation(KDConfig(), outputs=adapter.outputs, hidden_weight=10.0)
    losses = []
    Finetuner(20, lr=3e-3, warm_up=0.0).fit(
        slim, [(images,)], teacher=teacher, distillation=distillation, on_step=losses.append
    )
    assert "hidden" in losses[0] and losses[-1]["hidden"] < losses[0]["hidden"] and distance() < before


@pytest.mark.parametrize(
    ("adapter", "asked", "message"),
    [
        (
            ResNetAdapter(weights=None, image_size=32, stream=True),
            {"features": False, "hidden": True},
            r"distill\.hidden_weight: a narrower stream .*model\.adapter\.stream=false",
        ),
        (
            GraphAdapter("vgg11", image_size=32),
            {"features": False, "hidden": True},
            r"distill\.hidden_weight: this network has no residual blocks",
        ),
        (ADAPTERS["resnet"], {"features": True, "hidden": False}, r"distill\.chunk: only language models"),
    ],
)
def test_what_cannot_be_shown_is_refused(adapter, asked, message):
    with pytest.raises(ValueError, match=message):
        adapter.check_outputs(**asked)
