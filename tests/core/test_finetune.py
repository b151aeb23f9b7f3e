import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hawada.core.distill import Distillation, KDConfig, Outputs, TeacherCache
from hawada.core.finetune import Finetuner, recalibrate_batchnorm


@pytest.fixture
def problem():
    """A linearly separable problem in batches of 16, and all of it at once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(-1)
    return list(zip(x.split(16), y.split(16), strict=True)), x, y


def accuracy(model, x, y):
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def test_it_learns_from_labels(net, problem, accelerator):
    loader, x, y = problem
    epochs = []
    model = Finetuner(12, lr=0.02).fit(net, loader, accelerator=accelerator, on_epoch=lambda e, r: epochs.append(r))
    assert model is net and not model.training
    assert accuracy(model, x, y) > 0.9
    assert len(epochs) == 12 and set(epochs[0]) == {"label"}
    assert epochs[-1]["label"] < 0.5 * epochs[0]["label"]


def test_it_learns_from_a_teacher_alone(net, problem, accelerator):
    loader, x, y = problem
    teacher = copy.deepcopy(net)
    Finetuner(12, lr=0.02).fit(teacher, loader, accelerator=accelerator)
    before = copy.deepcopy(teacher.state_dict())
    unlabelled = [(batch,) for batch, _ in loader]
    torch.manual_seed(1)
    student = nn.Linear(6, 3)
    records = []
    Finetuner(20, lr=0.05).fit(
        student,
        unlabelled,
        teacher=teacher,
        distillation=Distillation(KDConfig(1.0)),
        accelerator=accelerator,
        on_step=records.append,
    )
    assert accuracy(student, x, y) > 0.9
    assert set(records[0]) == {"kd"} and len(records) == 20 * len(loader)
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_cached_teacher_teaches_the_same(net, problem, accelerator):
    loader, x, _ = problem
    numbered = [(x, y, torch.arange(16) + 16 * index) for index, (x, y) in enumerate(loader)]
    teacher, samples = copy.deepcopy(net).eval(), []
    teacher.register_forward_hook(lambda module, args, output: samples.append(len(output)))
    students = []
    for batches, cache in ((loader, None), (numbered, TeacherCache(len(x)))):
        torch.manual_seed(1)
        students.append(nn.Linear(6, 3))
        distillation = Distillation(KDConfig(1.0), cache=cache)
        samples.clear()
        Finetuner(3).fit(students[-1], batches, teacher=teacher, distillation=distillation, accelerator=accelerator)
        assert sum(samples) == len(x) * (3 if cache is None else 1)
    assert torch.equal(students[0].weight, students[1].weight)


def test_labels_are_weighted_against_the_teacher(net, problem, accelerator):
    x, y = problem[0][0]
    records, distillation = [], Distillation(KDConfig(2.0))
    teacher = copy.deepcopy(net).eval()
    Finetuner(1, lr=1e-9, label_weight=0.25).fit(
        net,
        [(x, y)],
        teacher=teacher,
        distillation=distillation,
        accelerator=accelerator,
        on_step=records.append,
    )
    assert distillation.label_weight == 0.0  # the finetuner's own weight counts; the caller's object is unchanged
    net.train().requires_grad_(False)
    assert records[0]["label"] == pytest.approx(0.25 * float(F.cross_entropy(net(x), y)), rel=1e-3)
    assert records[0]["kd"] == pytest.approx(float(KDConfig(2.0)(net(x), teacher(x))), rel=1e-3)


def test_frozen_parameters_of_a_slim_model_train_again(net, problem, accelerator):
    net.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    Finetuner(1, lr=0.01).fit(net, problem[0], accelerator=accelerator)
    assert not any(torch.equal(net.state_dict()[name], before[name]) for name in before)


def test_norms_and_biases_take_no_weight_decay(problem, accelerator):
    """Without a gradient, weight decay is all that moves a parameter."""
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    nn.init.ones_(model[0].bias)
    before = copy.deepcopy(model.state_dict())
    finetuner = Finetuner(2, lr=0.1, weight_decay=0.5)
    no_gradient = Distillation(outputs=lambda model, inputs, **_: Outputs(model(inputs) * 0.0))
    finetuner.fit(model, problem[0], accelerator=accelerator, distillation=no_gradient)
    assert float(model[0].weight.detach().norm()) < 0.9 * float(before["0.weight"].norm())
    assert torch.equal(model[0].bias, before["0.bias"]) and torch.equal(model[1].weight, before["1.weight"])


def test_the_same_seed_gives_the_same_weights(net, problem, accelerator):
    twins = [copy.deepcopy(net) for _ in range(2)]
    for twin in twins:
        Finetuner(2).fit(twin, problem[0], accelerator=accelerator)
    assert all(torch.equal(a, b) for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True))


def test_no_epochs_change_nothing(net, problem, accelerator):
    before = copy.deepcopy(net.state_dict())
    model = Finetuner(0).fit(net, problem[0], accelerator=accelerator)
    assert not model.training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("label_weight", "labelled"), [(1.0, False), (0.0, True)])
def test_without_teacher_and_labels_there_is_nothing_to_learn(net, problem, accelerator, label_weight, labelled):
    loader = problem[0] if labelled else [(x,) for x, _ in problem[0]]
    with pytest.raises(
        ValueError, match="there is nothing to learn from: no teacher, and no labels or label_weight=0; give"
    ):
        Finetuner(1, label_weight=label_weight).fit(net, loader, accelerator=accelerator)


def test_a_loss_that_is_not_finite_stops(net, problem, accelerator):
    loader = [(torch.full((16, 6), float("nan")), y) for _, y in problem[0]]
    with pytest.raises(FloatingPointError, match="the loss is not finite in epoch 1; lower the learning rate"):
        Finetuner(1).fit(net, loader, accelerator=accelerator)


@pytest.mark.parametrize(("epochs", "lr"), [(-1, 0.1), (1, 0.0), (1, -0.1)])
def test_negative_epochs_and_a_learning_rate_of_0_are_refused(epochs, lr):
    with pytest.raises(ValueError, match=r"epochs .* must not be negative and lr .* must be above 0"):
        Finetuner(epochs, lr=lr)


@pytest.mark.parametrize("training", [True, False])
def test_recalibrated_statistics_are_the_plain_averages(net, problem, training):
    net.train(training)
    norm = net[1]
    norm.momentum = 0.37
    weights = [parameter.clone() for parameter in net.parameters()]
    batches = problem[0]
    features = [net[0](batch).detach() for batch, _ in batches]
    assert recalibrate_batchnorm(net, batches) is net
    assert torch.allclose(norm.running_mean, torch.stack([x.mean(0) for x in features]).mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, torch.stack([x.var(0) for x in features]).mean(0), atol=1e-5)
    assert norm.momentum == 0.37
    assert all(module.training is training for module in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))


def test_dropout_stays_off_while_statistics_are_taken(problem):
    norm = nn.BatchNorm1d(6)
    recalibrate_batchnorm(nn.Sequential(nn.Dropout(0.9), norm).train(), problem[0])
    assert torch.allclose(norm.running_mean, problem[1].mean(0), atol=1e-6)


def test_statistics_without_data_are_refused(net):
    with pytest.raises(
        ValueError, match=r"cannot be recomputed without data; set finetune\.recalibration_samples above"
    ):
        recalibrate_batchnorm(net, [])


def test_a_model_without_norms_is_left_alone():
    model = nn.Linear(2, 2)

    def no_batches():
        raise AssertionError("no batch was needed")
        yield

    assert recalibrate_batchnorm(model, no_batches()) is model
