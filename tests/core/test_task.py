"""What outputs mean: classes of samples, tokens and pixels, and any tensors."""

import math

import pytest
import torch
from torch import nn

from hawada.core.distill import Distillation, KDConfig, Outputs
from hawada.core.structure import TensorRow
from hawada.core.task import IGNORED, AnyOutputs, Segmentation, Task

score = Task().score


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


def test_without_labels_the_predictions_are_compared():
    model = Fixed([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
    other = Fixed([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1]])
    batches = [(torch.tensor([[0, 1]]),), (torch.tensor([[2, 0]]),)]
    first, second = (score(each, batches, lambda output: output["logits"]) for each in (model, other))
    assert not first.figures and Task().metric("accuracy", labelled=False) == "agreement"
    assert Task().qualities("agreement", first, second) == (1.0, 0.75)


class Maps(nn.Module):
    """The classes of pixels are in the first channel of an image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        maps = nn.functional.one_hot(images[:, 0].long(), 3).movedim(-1, 1).float()
        return {"out": maps, "aux": maps * 0}


def test_the_mean_intersection_over_union_by_hand():
    images = torch.tensor([[[[0, 0], [1, 2]]], [[[2, 2], [1, 1]]]]).float()  # (2, 1, 2, 2)
    labels = torch.tensor([[0, 1, 1, 2], [2, 2, 2, IGNORED]])
    task = Segmentation()
    found = task.score(Maps(), [(images[:1], labels[:1]), (images[1:], labels[1:])], task.pick)
    # predicted 0 0 1 2 2 2 1, labels 0 1 1 2 2 2 2
    assert found.figures["mean_iou"] == pytest.approx((1 / 2 + 1 / 3 + 3 / 4) / 3)
    assert found.accuracy == pytest.approx(5 / 7) and task.metric("accuracy", labelled=True) == "mean_iou"


def test_pixels_are_distilled_and_learned_one_by_one():
    task, images = Segmentation(), torch.randint(0, 3, (2, 1, 4, 5)).float()
    rows = task.pick(Maps()(images))
    assert rows.shape == (2, 20, 3) and torch.equal(rows.argmax(-1), images.flatten(1).long())
    labels = images.flatten(1).long()
    labels[0, :7] = IGNORED
    terms = Distillation(KDConfig(), task=task, label_weight=1.0).losses(Outputs(rows), Outputs(rows), labels)
    assert float(terms["kd"]) == pytest.approx(0, abs=1e-6) and float(terms["label"]) < 0.7


class Several(nn.Module):
    """Two outputs of very different scales, of two inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, row):
        first, second = row.tensors
        return {"large": 1000 * first * self.weight, "small": [second * self.weight], "index": first.argmax(1)}


@pytest.fixture
def row():
    torch.manual_seed(0)
    return TensorRow([torch.randn(8, 3), torch.randn(8, 2, 2)])


def test_every_output_is_distilled_on_its_own_scale(row):
    task, output = AnyOutputs(), Several()(row)
    rows = task.pick(output).detach()
    assert rows.shape == (8, 3 + 4)
    loss = task.loss(KDConfig())
    for moved, scale in (
        (slice(0, 3), 1000 * row.tensors[0].std(correction=0)),
        (slice(3, 7), row.tensors[1].std(correction=0)),
    ):
        other = rows.clone()
        other[:, moved] += scale
        assert float(loss(other, rows)) == pytest.approx(0.5, rel=1e-4)  # one of two outputs is off by its deviation


def test_outputs_without_labels_are_scored_by_their_error(row):
    task = AnyOutputs()
    slim = Several()
    slim.weight.data *= 0.9
    teacher, other = (task.score(model, [(row,)], task.pick) for model in (Several(), slim))
    error = task.qualities(task.metric("accuracy", labelled=False), teacher, other)
    assert error[0] == 0.0 and error[1] == pytest.approx(0.1, rel=0.1)
    assert task.agreement(teacher, teacher) == 1.0 and 0.97 < task.agreement(teacher, other) < 1.0


def negative_error(output, labels):
    return -(output["large"] - labels).abs().mean()


def test_a_score_of_ones_own(row):
    task = AnyOutputs(score=f"{__name__}.negative_error")
    found = task.score(Several(), [(row, 1000 * row.tensors[0] + 2)], task.pick)
    assert task.metric("accuracy", labelled=True) == "score" and found.figures["score"] == pytest.approx(-2, rel=1e-4)


def test_labels_are_learned_where_that_is_asked_for():
    outputs, labels = torch.zeros(4, 2), torch.full((4, 2), 3.0)
    assert float(AnyOutputs().label_loss(outputs, labels)) == 0
    assert float(AnyOutputs(learn_labels=True).label_loss(outputs, labels)) == 9


def test_gates_of_any_outputs_have_a_likelihood(row):
    task = AnyOutputs()
    rows = task.pick(Several()(row)).requires_grad_()
    (gradient,) = torch.autograd.grad(task.sampled_nll(rows), rows)
    # of a normal distribution of deviation s, the score has the deviation 1 / s
    assert float(gradient[:, :3].std() * 1000) == pytest.approx(1, rel=0.5)
    assert float(gradient[:, 3:].std()) == pytest.approx(1, rel=0.5)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([2, 0]),
        torch.tensor([2.0, 0.0]),
        torch.tensor([[2], [0]], dtype=torch.int32),
        torch.tensor([[0, 0, 1], [1, 0, 0]]),
        torch.tensor([[0.1, 0.2, 0.7], [0.8, 0.1, 0.1]]),
    ],
)
def test_labels_of_any_common_form_are_class_indices(labels):
    assert Task().labels_of(labels, torch.zeros(2, 3)).tolist() == [2, 0]


def test_masks_of_any_common_form_are_class_indices():
    mask = torch.tensor([[[0, 1], [2, 255]]])  # (1, 2, 2)
    rows = torch.zeros(1, 4, 3)
    expected = [[0, 1, 2, IGNORED]]
    assert Segmentation().labels_of(mask, rows).tolist() == expected
    assert Segmentation().labels_of(mask[:, None].float(), rows).tolist() == expected
    one_hot = nn.functional.one_hot(mask.clamp_max(2), 3).movedim(-1, 1)
    assert Segmentation().labels_of(one_hot, rows).tolist() == [[0, 1, 2, 2]]


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"data: labels of shape \(2, 7\) do not fit outputs of shape \(2, 3\); give one"
    ):
        Task().labels_of(torch.zeros(2, 7), torch.zeros(2, 3))
