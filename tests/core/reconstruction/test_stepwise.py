import threading

import pytest
import torch
from torch import nn

from hawada.core.reconstruction.stepwise import StepwisePass, pausing_at


class Chain(nn.Module):
    """Three layers; records which of them ran, in order, with their outputs."""

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


def test_a_paused_pass_goes_on_with_changed_weights():
    model = Chain()
    one, other = StepwisePass(model, torch.ones(2)), StepwisePass(model, 2 * torch.ones(2))
    with pausing_at([model.layers[2], model.layers[1]], before=True):
        assert one.advance_to(model.layers[1]).tolist() == [1, 1] and other.advance_to(model.layers[1]).tolist() == [
            2,
            2,
        ]
        assert [index for index, _ in model.ran] == [0, 0]
        model.layers[1].weight.data *= 3
        assert one.advance_to(model.layers[2]).tolist() == [3, 3] and other.advance_to(model.layers[2]).tolist() == [
            6,
            6,
        ]
        closing(one, other)
    assert [index for index, _ in model.ran] == [0, 0, 1, 1]  # the last layer ran in neither pass


def test_a_pause_after_a_module_hands_over_its_output():
    model = Chain()
    model.layers[0].weight.data *= 5
    one = StepwisePass(model, torch.ones(2))
    with pausing_at([model.layers[0]], before=False):
        assert one.advance_to(model.layers[0]).tolist() == [5, 5]
        assert model(torch.ones(2)).tolist() == [5, 5]  # an ordinary pass does not pause
        for _ in range(2):
            with pytest.raises(
                RuntimeError,
                match=r"export\.reconstruct: the forward pass reached its end before .*; set export\.reconstruct=false",
            ):
                one.advance_to(model.layers[0])
    closing(one)


def test_layers_called_in_another_order_are_refused():
    model = Chain()
    one = StepwisePass(model, torch.ones(2))
    with pausing_at(list(model.layers), before=False):
        one.advance_to(model.layers[0])
        with pytest.raises(
            RuntimeError, match=r"the forward pass reached another layer before the layer that was expected"
        ):
            one.advance_to(model.layers[2])
        closing(one)


def test_gradients_are_not_recorded():
    model = Chain()
    one = StepwisePass(model, torch.ones(2))
    with pausing_at([model.layers[1]], before=True):
        assert not one.advance_to(model.layers[1]).requires_grad
        closing(one)


def test_errors_of_the_model_reach_the_caller():
    model, before = Chain(), threading.active_count()
    one, never = StepwisePass(model, torch.ones(3)), StepwisePass(model, torch.ones(2))
    with pausing_at([model.layers[0]], before=False), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        one.advance_to(model.layers[0])
    closing(one, never)
    assert threading.active_count() == before
