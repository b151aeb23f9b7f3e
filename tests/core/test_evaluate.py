import copy
import math

import pytest
import torch
from torch import nn

from hawada.core.distill import IGNORED
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
    labels = torch.tensor([2, 0, 1, 1, 2])
    inputs = nn.functional.one_hot(torch.tensor([2, 0, 0, 1, 2]), 3).float()
    batches = [(inputs[:3], labels[:3]), (inputs[3:], labels[3:])]
    found = score(model, batches, lambda output: output)
    assert found.predicted.tolist() == [2, 0, 0, 1, 2] and found.accuracy == 0.8
    flipped = score(model, batches, lambda output: -output - torch.arange(3) * 0.1)
    assert flipped.predicted.tolist() == [0, 1, 1, 0, 0] and flipped.accuracy == 0.2
    assert not found.predicted.requires_grad


def test_outputs_are_compared_by_their_largest_difference():
    found = compare_outputs(torch.tensor([[1.0, -8.0]], dtype=torch.bfloat16), torch.tensor([[1.5, -8.25]]))
    assert found == {"max_abs_diff": pytest.approx(0.5), "max_abs_logit": pytest.approx(8.0)}


class Fixed(nn.Module):
    """The logits of a token are a row of its table."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table).log())

    def forward(self, tokens):
        return {"logits": self.table[tokens]}


def test_perplexity_by_hand():
    model = Fixed([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
    batches = [
        (torch.tensor([[0, 1], [2, 0]]), torch.tensor([[1, 1], [0, 0]])),  # 1/4, 4/5; 1/5, 1/2
        (torch.tensor([[2]]), torch.tensor([[2]])),  # a shorter batch: every token counts once
    ]
    found = score(model, batches, lambda output: output["logits"])
    nll = -math.log(0.25 * 0.8 * 0.2 * 0.5 * 0.5) / 5
    assert found.nll == pytest.approx(nll, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    assert found.predicted.tolist() == [0, 1, 2, 0, 2] and found.accuracy == pytest.approx(3 / 5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_it_has_classes():
    model = Fixed([[1.0] * 7] * 3)
    found = score(model, [(torch.tensor([[0, 1, 2]]), torch.tensor([[6, 3, 0]]))], lambda output: output["logits"])
    assert found.perplexity == pytest.approx(7.0)


def test_ignored_labels_are_not_counted():
    model = Fixed([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
    tokens, labels = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[1, IGNORED], [IGNORED, 0]])
    found = score(model, [(tokens, labels), (tokens[:1], labels[:1])], lambda output: output["logits"])
    assert found.nll == pytest.approx(-math.log(0.25 * 0.5 * 0.25) / 3, rel=1e-6)
    assert found.predicted.tolist() == [0, 0, 0] and found.accuracy == pytest.approx(1 / 3)
    other = score(model, [(torch.tensor([[0, 2], [1, 0]]), labels)], lambda output: output["logits"])
    assert other.nll == pytest.approx(-math.log(0.25 * 0.5) / 2, rel=1e-6)


@pytest.mark.parametrize("labels", [[], [torch.full((1, 2), IGNORED)]])
def test_without_labels_that_count_there_is_nothing_to_score(labels):
    batches = [(torch.zeros(1, 2, dtype=torch.long), label) for label in labels]
    with pytest.raises(
        ValueError, match=r"the test data is empty; check data\.root, data\.path and data\.test_samples"
    ):
        score(Fixed([[0.5, 0.5]]), batches, lambda output: output["logits"])


def test_an_endless_perplexity_is_still_a_number():
    model = Fixed([[1.0, 0.0]])
    found = score(model, [(torch.tensor([0]), torch.tensor([1]))], lambda output: output["logits"].clamp_min(-1e6))
    assert found.nll == pytest.approx(1e6) and math.isfinite(found.perplexity)
