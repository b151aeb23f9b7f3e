import threading

import pytest
import torch
from torch import nn

from hawada.core.reconstruction.stepwise import Stepwise, stops


class Chain(nn.Module):
    """Three layers; remembers which ran, and in which order."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        self.ran = []
        for layer in self.layers:
            nn.init.eye_(layer.weight)

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x)
            self.ran.append((index, x.tolist()))
        return x


def closing(*passes):
    for one in passes:
        one.close()
        assert not one.is_alive()


def test_what_is_changed_while_a_pass_stands_still_is_what_it_goes_on_with():
    model = Chain()
    one, other = Stepwise(model, torch.ones(2)), Stepwise(model, 2 * torch.ones(2))
    with stops([model.layers[2], model.layers[1]], before=True):
        assert one.step(model.layers[1]).tolist() == [1, 1] and other.step(model.layers[1]).tolist() == [2, 2]
        assert [index for index, _ in model.ran] == [0, 0]
        model.layers[1].weight.data *= 3
        assert one.step(model.layers[2]).tolist() == [3, 3] and other.step(model.layers[2]).tolist() == [6, 6]
        closing(one, other)
    assert [index for index, _ in model.ran] == [0, 0, 1, 1]  # the last layer ran for none


def test_behind_a_module_its_output_is_shown():
    model = Chain()
    model.layers[0].weight.data *= 5
    one = Stepwise(model, torch.ones(2))
    with stops([model.layers[0]], before=False):
        assert one.step(model.layers[0]).tolist() == [5, 5]
        assert model(torch.ones(2)).tolist() == [5, 5]  # a pass like any other runs through
        for _ in range(2):
            with pytest.raises(RuntimeError, match="came to its end"):
                one.step(model.layers[0])
    closing(one)


def test_layers_that_come_in_another_order_are_noticed():
    model = Chain()
    one = Stepwise(model, torch.ones(2))
    with stops(list(model.layers), before=False):
        one.step(model.layers[0])
        with pytest.raises(RuntimeError, match="came to another layer"):
            one.step(model.layers[2])
        closing(one)


def test_gradients_are_not_recorded():
    model = Chain()
    one = Stepwise(model, torch.ones(2))
    with stops([model.layers[1]], before=True):
        assert not one.step(model.layers[1]).requires_grad
        closing(one)


def test_what_the_model_raises_reaches_who_waits():
    model, before = Chain(), threading.active_count()
    one, never = Stepwise(model, torch.ones(3)), Stepwise(model, torch.ones(2))
    with stops([model.layers[0]], before=False), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        one.step(model.layers[0])
    closing(one, never)
    assert threading.active_count() == before
