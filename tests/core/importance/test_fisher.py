import copy

import pytest
import torch
import torch.nn.functional as F

from hawada.core.distill import Outputs
from hawada.core.gates import Student
from hawada.core.importance.fisher import fisher_importance, start_from_importance
from hawada.core.task import IGNORED


@pytest.fixture
def student(toy, groups):
    return Student(copy.deepcopy(toy), groups)


def exact(student, inputs):
    """Half the expected squared gradient, summed over all classes instead of drawn."""
    totals = {group.name: torch.zeros(group.units) for group in student.groups}
    masks = [torch.ones(group.units, requires_grad=True) for group in student.groups]
    for gate, mask in zip(student.gates, masks, strict=True):
        gate.hard = mask
    for row in inputs:
        logs = F.log_softmax(student(row[None]), dim=-1)[0]
        for log in logs:
            found = torch.autograd.grad(log, masks, retain_graph=True)
            for group, gradient in zip(student.groups, found, strict=True):
                totals[group.name] += log.exp().detach() * gradient.square() / (2 * len(inputs))
    for gate in student.gates:
        gate.hard = None
    return totals


def test_the_fisher_information_is_the_expected_square_whatever_the_batches(student, inputs):
    torch.manual_seed(0)
    expected = exact(student, inputs)
    found = fisher_importance(student, [(inputs[:8],), (inputs[8:],)] * 1500)
    for name, values in expected.items():
        assert torch.allclose(found[name], values, rtol=0.15, atol=0.02 * float(values.max())), name
    assert all(gate.hard is None for gate in student.gates)


def test_tokens_whose_label_is_ignored_do_not_count(student, inputs):
    def by_token(model, inputs, *, features, hidden):
        return Outputs(model(inputs).unflatten(0, (-1, 2)))  # two tokens per text

    labels = torch.tensor([[0, IGNORED]] * 8)
    torch.manual_seed(0)
    one = fisher_importance(student, [(inputs, labels)], by_token)
    others = inputs.clone()
    others[1::2] = 7.0
    torch.manual_seed(0)
    assert all(torch.allclose(one[k], v) for k, v in fisher_importance(student, [(others, labels)], by_token).items())


def test_logits_may_be_made_in_chunks(student, inputs):
    def by_features(model, inputs, *, features, hidden):
        head, model.model.head = model.model.head, torch.nn.Identity()
        try:
            return Outputs(None, model(inputs), head) if features else Outputs(head(model(inputs)))
        finally:
            model.model.head = head

    found = []
    for chunk in (None, 16, 5):
        torch.manual_seed(0)
        found.append(fisher_importance(student, [(inputs,)], by_features, chunk))
    for name, values in found[0].items():
        assert torch.allclose(found[1][name], values)  # one chunk
        assert (found[2][name] > 0).any() and found[2][name].shape == values.shape  # the draws differ


def test_gates_of_important_units_start_higher_ranked_within_their_kind(student):
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


def test_gates_of_equal_importance_start_equal(student):
    importance = {group.name: torch.zeros(group.units) for group in student.groups}
    importance["second.hidden"][5] = 1.0
    before = student.gate_of("first.hidden").theta.detach().clone()
    start_from_importance(student, importance, spread=1.0)
    moved = student.gate_of("first.hidden").theta.detach() - before
    assert moved.unique().numel() == 1 and moved[0] < 0
    hidden = student.gate_of("second.hidden").theta.detach()
    assert hidden.argmax() == 5 and hidden[:5].unique().numel() == 1
