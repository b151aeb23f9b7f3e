import copy
import math

import pytest
import torch
from torch import nn

from hawada.core.evaluate import compare_outputs, count_macs, count_parameters


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


def test_outputs_are_compared_by_their_largest_difference():
    found = compare_outputs(torch.tensor([[1.0, -8.0]], dtype=torch.bfloat16), torch.tensor([[1.5, -8.25]]))
    assert found == {"max_abs_diff": pytest.approx(0.5), "max_abs_logit": pytest.approx(8.0)}


def test_of_several_outputs_the_one_that_differs_most_on_its_scale_counts():
    first = {"large": torch.tensor([100.0, -400.0]), "small": [torch.tensor([0.01])], "none": torch.zeros(0)}
    second = {"large": torch.tensor([101.0, -400.0]), "small": [torch.tensor([0.02])], "none": torch.zeros(0)}
    found = compare_outputs(first, second)
    assert found == {"max_abs_diff": pytest.approx(0.01), "max_abs_logit": pytest.approx(0.01)}


def test_what_is_not_a_number_differs_most_wherever_it_is():
    first, second = (torch.ones(2), torch.tensor([1.0, math.nan])), (torch.ones(2), torch.tensor([1.0, 2.0]))
    assert math.isnan(compare_outputs(first, second)["max_abs_diff"])
    assert math.isnan(compare_outputs(first[::-1], second[::-1])["max_abs_diff"])


def test_a_difference_that_float32_does_not_show_is_seen():
    first = torch.ones(2, dtype=torch.float64)
    assert compare_outputs(first, first + 1e-9)["max_abs_diff"] == pytest.approx(1e-9, rel=1e-6)
