import copy

import pytest
import torch
from torch import nn

from hawada.core.finetune import Finetuner
from hawada.core.memory_format import channels_last


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(1))


def strides(model):
    return {name: parameter.stride() for name, parameter in model.named_parameters()}


def test_convolutions_compute_channels_last_within_the_block_and_lie_as_before_after_it(model):
    before, parameters, x = strides(model), list(model.parameters()), torch.randn(2, 3, 6, 6)
    plain = model(x)
    with pytest.raises(RuntimeError, match="on the way"), channels_last([model]):
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert not model[0].weight.is_contiguous()
        inside = model[0](x)
        assert inside.is_contiguous(memory_format=torch.channels_last) and not inside.is_contiguous()
        assert torch.allclose(model(x), plain, atol=1e-5)
        raise RuntimeError("on the way")
    assert strides(model) == before
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


def test_nothing_changes_unless_enabled(model):
    before = strides(model)
    with channels_last([model], enabled=False):
        assert strides(model) == before


def test_training_differs_by_rounding_alone(model, accelerator):
    batches = [(torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 3])) for _ in range(3)]
    trained = [copy.deepcopy(model) for _ in range(2)]
    for one, enabled in zip(trained, (False, True), strict=True):
        with channels_last([one], enabled):
            Finetuner(epochs=1, lr=1e-3).fit(one, batches, accelerator=accelerator)
    for one, other, before in zip(*(each.parameters() for each in (*trained, model)), strict=True):
        assert torch.allclose(one, other, atol=2e-4) and not torch.equal(one, before)
        assert one.stride() == other.stride()
