import copy

import pytest
import torch
from torch import nn

from hawada.core.evaluate import compare_outputs, count_macs, count_parameters, score


def test_tied_parameters_count_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
    second.weight = first.weight
    assert count_parameters(nn.Sequential(first, second)) == 16 + 4


def test_macs_by_hand():
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 5, 7))
    before = copy.deepcopy(model.state_dict())
    assert count_macs(model, (torch.zeros(2, 3, 10, 10),)) == 2 * (4 * 25 * 3 * 9 + 100 * 7)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_predictions_come_in_order():
    model = nn.Linear(3, 3, bias=False)
    nn.init.eye_(model.weight)
    wanted = torch.tensor([2, 0, 1, 1, 2])
    inputs = nn.functional.one_hot(torch.tensor([2, 0, 0, 1, 2]), 3).float()
    batches = [(inputs[:3], wanted[:3]), (inputs[3:], wanted[3:])]
    found = score(model, batches, lambda output: output)
    assert found.predicted.tolist() == [2, 0, 0, 1, 2] and found.accuracy == 0.8
    flipped = score(model, batches, lambda output: -output - torch.arange(3) * 0.1)
    assert flipped.predicted.tolist() == [0, 1, 1, 0, 0] and flipped.accuracy == 0.2
    assert not found.predicted.requires_grad


def test_outputs_are_compared_by_their_largest_difference():
    found = compare_outputs(torch.tensor([[1.0, -8.0]], dtype=torch.bfloat16), torch.tensor([[1.5, -8.25]]))
    assert found == {"max_abs_diff": pytest.approx(0.5), "max_abs_logit": pytest.approx(8.0)}
