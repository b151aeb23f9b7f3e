import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hawada.core.distill import (
    Alignment,
    Distillation,
    KDConfig,
    OtherTeacher,
    Outputs,
    TeacherCache,
    hidden_mse,
    kd_loss,
    mse_reg,
)
from hawada.core.task import IGNORED

KL = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)  # teacher (1/4, 3/4), student (1/2, 1/2)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_kd_by_hand(temperature):
    teacher = torch.tensor([[0.0, temperature * math.log(3.0)]])
    student = torch.tensor([[1.0, 1.0]])
    assert float(kd_loss(student, teacher, temperature)) == pytest.approx(temperature**2 * KL, rel=1e-5)


def test_kd_is_averaged_over_every_axis_but_the_last():
    teacher = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]).repeat(3, 1, 1)  # (3, 2, classes); half agree
    assert float(kd_loss(torch.zeros(3, 2, 2), teacher)) == pytest.approx(KL / 2, rel=1e-5)


def test_kd_does_not_see_an_offset_and_mse_does():
    logits = torch.randn(4, 5)
    assert float(kd_loss(logits + 3, logits)) == pytest.approx(0.0, abs=1e-6)
    assert float(mse_reg(logits + 3, logits)) == pytest.approx(9.0, rel=1e-5)


def test_losses_of_half_precision_logits_are_float32():
    logits = torch.randn(4, 5, dtype=torch.bfloat16)
    assert kd_loss(logits, -logits).dtype == mse_reg(logits, -logits).dtype == torch.float32


def test_config_adds_the_weighted_terms():
    teacher, student = torch.tensor([[0.0, 2 * math.log(3.0)]]), torch.zeros(1, 2)
    mse = (2 * math.log(3.0)) ** 2 / 2
    assert float(KDConfig(2.0)(student, teacher)) == pytest.approx(4 * KL, rel=1e-5)
    assert float(KDConfig(2.0, 0.5)(student, teacher)) == pytest.approx(4 * KL + 0.5 * mse, rel=1e-5)


def test_gradient_flows_to_the_student():
    student = torch.zeros(1, 2, requires_grad=True)
    KDConfig(2.0, 0.5)(student, torch.tensor([[0.0, 1.0]])).backward()
    assert float(student.grad[0, 0]) > 0 > float(student.grad[0, 1])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=r"kd\.temperature: .* is not above 0; 1 to 4 are usual"):
        KDConfig(temperature)


@pytest.mark.parametrize("weight", [-0.1, math.nan])
def test_mse_weight_must_not_be_negative(weight):
    with pytest.raises(ValueError, match=r"kd\.mse_weight: .* is negative; 0 switches the term off"):
        KDConfig(2.0, weight)


CLASSES = 11


class Toy(nn.Module):
    """Tokens -> features -> logits, in float64, with hidden states."""

    def __init__(self, width, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.body = nn.Parameter(torch.randn(5, width, generator=generator, dtype=torch.float64))
        self.head = nn.Linear(width, CLASSES).double()
        self.head.weight.data = torch.randn(CLASSES, width, generator=generator, dtype=torch.float64)


def toy_outputs(model, inputs, *, features=False, hidden=False):
    found = model.body[inputs]  # (batch, tokens, width)
    states = (found, found**2) if hidden else ()
    if features:
        return Outputs(None, found, model.head, states)
    return Outputs(model.head(found), hidden=states)


@pytest.fixture
def models():
    """A student and a wider teacher, (3, 4) tokens, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(5, (3, 4), generator=generator)
    labels = torch.randint(CLASSES, (3, 4), generator=generator)
    some = labels.masked_fill(torch.tensor([[0, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool), IGNORED)
    return Toy(6, 0), Toy(9, 1), tokens, {"none": None, "all": labels, "some": some}


def losses_and_gradients(models, labels, **options):
    student, teacher, tokens, all_labels = models
    student.zero_grad()
    distillation = Distillation(outputs=toy_outputs, **options)
    with torch.no_grad():
        targets = distillation.outputs_of(teacher, tokens) if distillation.loss is not None else None
    losses = distillation.losses(distillation.outputs_of(student, tokens), targets, all_labels[labels])
    sum(losses.values()).backward()
    values = {name: float(value.detach()) for name, value in losses.items()}
    return values, [parameter.grad.clone() for parameter in student.parameters()]


LABELS_AND_LOSS = [(labels, KDConfig(2.0, 0.3)) for labels in ("none", "all", "some")] + [("all", None), ("some", None)]


@pytest.mark.parametrize("chunk", [1, 3, 5, 12, 100])
@pytest.mark.parametrize(("labels", "loss"), LABELS_AND_LOSS)
def test_losses_in_chunks_are_the_plain_losses(models, labels, chunk, loss):
    """Five divides neither the twelve tokens nor the five that count when some labels are ignored."""
    options = {"loss": loss, "label_weight": 0.7}
    plain, gradients = losses_and_gradients(models, labels, **options)
    chunked, chunked_gradients = losses_and_gradients(models, labels, chunk=chunk, **options)
    assert set(plain) == ({"kd"} if loss else set()) | ({"label"} if labels != "none" else set())
    assert chunked == pytest.approx(plain, rel=1e-5)
    for gradient, expected in zip(chunked_gradients, gradients, strict=True):
        assert float((gradient - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("chunk", [None, 2])
def test_tokens_whose_label_is_ignored_do_not_count(models, chunk):
    student, teacher, tokens, labels = models
    valid = labels["some"] != IGNORED
    values, _ = losses_and_gradients(models, "some", loss=KDConfig(2.0), label_weight=0.7, chunk=chunk)
    outputs, targets = (toy_outputs(model, tokens).logits[valid] for model in (student, teacher))
    assert values["kd"] == pytest.approx(float(kd_loss(outputs, targets, 2.0).detach()), rel=1e-5)
    label = 0.7 * F.cross_entropy(outputs.float(), labels["some"][valid])
    assert values["label"] == pytest.approx(float(label.detach()), rel=1e-5)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("hidden_weight", [0.0, 0.5])
def test_the_outputs_at_ignored_tokens_have_no_gradient(models, chunk, hidden_weight):
    student, _, tokens, labels = models
    teacher = Toy(6, 1)
    distillation = Distillation(
        KDConfig(2.0, 0.1), outputs=toy_outputs, label_weight=1.0, chunk=chunk, hidden_weight=hidden_weight
    )
    features = student.body[tokens].detach().requires_grad_()
    states = (features, features**2)
    outputs = Outputs(None, features, student.head, states) if chunk else Outputs(student.head(features), hidden=states)
    with torch.no_grad():
        targets = distillation.outputs_of(teacher, tokens)
    sum(distillation.losses(outputs, targets, labels["some"]).values()).backward()
    ignored = labels["some"] == IGNORED
    assert bool((features.grad[ignored] == 0).all()) and bool((features.grad[~ignored] != 0).any(-1).all())


def test_labels_of_images_are_compared_whole():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, IGNORED, 1])
    distillation = Distillation(label_weight=2.0)
    found = distillation.losses(Outputs(logits), None, labels)
    kept = labels != IGNORED
    assert float(found["label"]) == pytest.approx(2 * float(F.cross_entropy(logits[kept], labels[kept])), rel=1e-6)


def test_a_chunked_loss_runs_heads_on_chunks_alone(models):
    student, teacher, tokens, labels = models
    rows = []
    for model in (student, teacher):
        model.head.register_forward_hook(lambda _, args, output: rows.append(len(args[0])))
    losses_and_gradients((student, teacher, tokens, labels), "all", loss=KDConfig(1.0), chunk=5)
    assert set(rows) == {5, 2}
    assert sum(rows) == 2 * 2 * 12  # both heads, forward and made again backward


def test_without_teacher_and_labels_there_are_no_losses(models):
    student, teacher, tokens, _ = models
    outputs = toy_outputs(student, tokens)
    assert Distillation(KDConfig(1.0), label_weight=1.0).losses(outputs, None, None) == {}
    assert set(Distillation(KDConfig(1.0)).losses(outputs, toy_outputs(teacher, tokens), torch.zeros(3, 4).long())) == {
        "kd"
    }


def test_hidden_mse_by_hand():
    student = [torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 3.0]]])]
    teacher = [torch.tensor([[[1.0, 4.0]]]), torch.tensor([[[1.0, 3.0]]])]
    expected = ((4 / 2) / (17 / 2) + (1 / 2) / (10 / 2)) / 2
    assert float(hidden_mse(student, teacher)) == pytest.approx(expected, rel=1e-6)
    assert float(hidden_mse(teacher, teacher)) == 0.0


def test_hidden_mse_is_relative_to_the_teachers_scale():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    plain = float(hidden_mse([student], [teacher]))
    assert float(hidden_mse([1000 * student], [1000 * teacher])) == pytest.approx(plain, rel=1e-5)
    assert hidden_mse([student.bfloat16()], [teacher.bfloat16()]).dtype == torch.float32


def test_dropped_layers_and_units_are_left_out_of_the_comparison():
    teacher = [torch.randn(2, 3, 5) for _ in range(4)]
    alignment = Alignment(states=(0, 1, 3), units=(0, 2, 4))
    student = [state[..., [0, 2, 4]].clone() for state in (teacher[0], teacher[1], teacher[3])]
    assert float(hidden_mse(student, teacher, alignment)) == 0.0
    assert float(hidden_mse(student, teacher, Alignment((0, 2, 3), alignment.units))) > 0.1
    assert float(hidden_mse(student, teacher, Alignment(alignment.states, (0, 1, 4)))) > 0.1
    whole = [teacher[index] for index in alignment.states]
    assert float(hidden_mse(whole, teacher, Alignment(alignment.states))) == 0.0
    for dropped in (teacher[2], *(state[..., index] for state in teacher for index in (1, 3))):
        dropped.fill_(100.0)  # what the student has no part in does not matter
    assert float(hidden_mse(student, teacher, alignment)) == 0.0


def test_hidden_states_count_only_where_tokens_do():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    valid = torch.tensor([[True, False, True], [False, False, True]])
    expected = F.mse_loss(student[valid], teacher[valid]) / teacher[valid].square().mean()
    assert float(hidden_mse([student], [teacher], valid=valid)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("chunk", [None, 5])
def test_hidden_states_join_the_losses_with_their_weight(models, chunk):
    alignment = Alignment((0, 1), (0, 1, 2, 5, 7, 8))
    student, teacher, tokens, labels = models
    values, _ = losses_and_gradients(
        models, "some", loss=KDConfig(1.0), chunk=chunk, hidden_weight=0.5, alignment=alignment
    )
    states = [toy_outputs(model, tokens, hidden=True).hidden for model in (student, teacher)]
    expected = 0.5 * hidden_mse(*states, alignment, labels["some"] != IGNORED)
    assert set(values) == {"kd", "hidden"}
    assert values["hidden"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_model_without_hidden_states_is_named_with_the_remedy(models):
    student, teacher, tokens, _ = models
    distillation = Distillation(KDConfig(1.0), hidden_weight=0.5)
    outputs, targets = (Outputs(model.head(model.body[tokens])) for model in (student, teacher))
    with pytest.raises(
        ValueError, match=r"hidden_weight: 0\.5 compares .* this model returns no hidden states; set it to 0"
    ):
        distillation.losses(outputs, targets, None)


class Counting(nn.Module):
    """Logits from its own layer; counts the samples that it ran on."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.samples = nn.Linear(4, 3), 0

    def forward(self, x):
        self.samples += len(x)
        return self.layer(x)


def with_states(model, inputs, *, features=False, hidden=False):
    return Outputs(model(inputs), hidden=(inputs * 2,) if hidden else ())


def test_another_teacher_gives_the_logits_and_the_teacher_the_hidden_states():
    teacher, other, x = Counting(0), Counting(1), torch.randn(5, 4)
    alone = Distillation(KDConfig(), outputs=with_states, other=OtherTeacher(other))
    targets = alone.targets(teacher, x)
    assert torch.equal(targets.logits, other(x)) and targets.hidden == () and teacher.samples == 0
    both = Distillation(KDConfig(), outputs=with_states, hidden_weight=1.0, other=OtherTeacher(other))
    targets = both.targets(teacher, x)
    assert torch.equal(targets.logits, other(x)) and torch.equal(targets.hidden[0], x * 2) and teacher.samples == 5
    assert not targets.logits.requires_grad


def test_logits_are_cached_only_where_the_samples_have_numbers():
    teacher, x, numbers = Counting(0), torch.randn(5, 4), torch.arange(5)
    distillation = Distillation(KDConfig(), cache=TeacherCache(5))
    for _ in range(3):
        assert torch.equal(distillation.targets(teacher, x, numbers).logits, teacher.layer(x))
    assert teacher.samples == 5
    distillation.targets(teacher, x)
    assert teacher.samples == 10


def test_hidden_states_are_not_cached_but_another_teachers_logits_are():
    teacher, other, x, numbers = Counting(0), Counting(1), torch.randn(5, 4), torch.arange(5)
    distillation = Distillation(
        KDConfig(), outputs=with_states, hidden_weight=1.0, other=OtherTeacher(other), cache=TeacherCache(5)
    )
    for _ in range(3):
        assert torch.equal(distillation.targets(teacher, x, numbers).hidden[0], x * 2)
    assert (teacher.samples, other.samples) == (15, 5)
