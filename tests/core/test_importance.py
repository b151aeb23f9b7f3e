import copy

import pytest
import torch
import torch.nn.functional as F

from hawada.core.distill import IGNORED, Outputs
from hawada.core.importance import fisher_importance, start_from_importance
from hawada.core.student import Student


@pytest.fixture
def student(toy, groups):
    return Student(copy.deepcopy(toy), groups)


def exact(student, inputs):
    """Half the expected square, answer by answer: no draw."""
    totals = {group.name: torch.zeros(group.units) for group in student.groups}
    masks = [torch.ones(group.units, requires_grad=True) for group in student.groups]
    for gate, mask in zip(student.gates, masks, strict=True):
        gate.hard = mask
    for row in inputs:
        said = F.log_softmax(student(row[None]), dim=-1)[0]
        for answer in said:
            found = torch.autograd.grad(answer, masks, retain_graph=True)
            for group, gradient in zip(student.groups, found, strict=True):
                totals[group.name] += answer.exp().detach() * gradient.square() / (2 * len(inputs))
    for gate in student.gates:
        gate.hard = None
    return totals


def test_the_fisher_information_is_the_expected_square_whatever_the_batches(student, inputs):
    torch.manual_seed(0)
    wanted = exact(student, inputs)
    found = fisher_importance(student, [(inputs[:8],), (inputs[8:],)] * 1500)
    for name, values in wanted.items():
        assert torch.allclose(found[name], values, rtol=0.15, atol=0.02 * float(values.max())), name
    assert all(gate.hard is None for gate in student.gates)


def test_tokens_that_do_not_count_have_no_part_in_it(student, inputs):
    def by_token(model, inputs, *, features, hidden):
        return Outputs(model(inputs).unflatten(0, (-1, 2)))  # two tokens a text

    labels = torch.tensor([[0, IGNORED]] * 8)
    torch.manual_seed(0)
    one = fisher_importance(student, [(inputs, labels)], by_token)
    others = inputs.clone()
    others[1::2] = 7.0
    torch.manual_seed(0)
    assert all(torch.allclose(one[k], v) for k, v in fisher_importance(student, [(others, labels)], by_token).items())


def test_units_that_matter_begin_further_open_ranked_within_their_kind(student):
    importance = {
        "first.branch": torch.tensor([3.0]),
        "second.branch": torch.tensor([1.0]),
        "first.hidden": torch.arange(8.0) * 1e6,
        "second.hidden": torch.arange(8.0) + 0.5,
    }
    before = {name: student.gate_of(name).theta.detach().clone() for name in importance}
    start_from_importance(student, importance, spread=2.0)
    moved = {name: student.gate_of(name).theta.detach() - theta for name, theta in before.items()}
    normal = torch.distributions.Normal(0.0, 1.0)
    assert moved["first.branch"].item() == pytest.approx(2 * normal.icdf(torch.tensor(0.75)).item(), abs=1e-5)
    assert moved["second.branch"].item() == pytest.approx(-moved["first.branch"].item(), abs=1e-5)
    together = torch.cat([moved["first.hidden"], moved["second.hidden"]])
    assert abs(together.mean().item()) < 1e-5
    order = torch.cat([importance["first.hidden"], importance["second.hidden"]]).argsort()
    assert (together[order].diff() > 0).all()
