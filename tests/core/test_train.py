import copy
import json

import pytest
import torch

from hawada.core.distill import Distillation, KDConfig, TeacherCache, mse_reg
from hawada.core.gates import L1, Student
from hawada.core.structure import ExportPolicy, full_widths, materialize
from hawada.core.task import IGNORED
from hawada.core.train import LagrangeTrainer, Step

TEACHER_MS = 9.0


@pytest.fixture
def make_trainer(toy, groups, linear_proxy, accelerator):
    def make(*, lr=0.05, weight_lr=None, gated=None, **options):
        student = Student(copy.deepcopy(toy), gated or groups)
        thetas = [gate.theta for gate in student.gates]
        settings = {
            "proxy": linear_proxy(),
            "gate_optimizer": torch.optim.Adam(thetas, lr=lr),
            "weight_optimizer": weight_lr and torch.optim.SGD(student.model.parameters(), lr=weight_lr),
            "distillation": Distillation(KDConfig(1.0)),
            "groups": groups,
            "target_ms": None,
            "teacher_ms": TEACHER_MS,
            "accelerator": accelerator,
        }
        return LagrangeTrainer(student, toy, **(settings | options))

    return make


@pytest.fixture
def loader(inputs):
    return [(inputs[:8],), (inputs[8:], torch.zeros(8))]


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_lambda_rises_only_above_the_target_and_falls_with_slack(make_trainer, loader):
    slow = make_trainer(target_ms=4.0, lambda_init=1.0, lr=0.0).train_epoch(loader)
    fast = make_trainer(target_ms=8.95, lambda_init=1.0, lr=0.0).train_epoch(loader)
    assert slow.gap > 0 and slow.lambda_ == pytest.approx(1.0 + 2 * 0.1 * slow.gap)
    assert fast.gap < 0 and fast.lambda_ == pytest.approx(1.0 + 2 * 0.1 * fast.gap)


def test_the_gap_is_relative_to_the_teacher(make_trainer, loader):
    trainer = make_trainer(target_ms=4.5, lr=0.0)
    step = trainer.train_epoch(loader)
    assert step.proxy_ms == pytest.approx(float(trainer.predicted_ms().detach()))
    assert step.gap == pytest.approx((step.proxy_ms - 4.5) / TEACHER_MS)


def test_lambda_is_never_negative(make_trainer):
    trainer = make_trainer(target_ms=5.0, lambda_init=0.1, lambda_lr=1.0)
    assert trainer.step_lambda(-0.05) == pytest.approx(0.05)
    assert trainer.step_lambda(-3.0) == 0.0
    assert trainer.step_lambda(0.2) == pytest.approx(0.2)


@pytest.mark.parametrize("options", [{"target_ms": 4.0, "lambda_lr": 0.0}, {"target_ms": None, "lambda_lr": 5.0}])
def test_lambda_is_fixed_without_a_rate_or_a_target(make_trainer, loader, options):
    trainer = make_trainer(lambda_init=0.7, **options)
    before = float(trainer.predicted_ms().detach())
    step = trainer.train_epoch(loader)
    assert step.lambda_ == trainer.lambda_ == 0.7
    assert float(trainer.predicted_ms().detach()) < before  # the cost still counts


def test_gates_learn_the_same_from_a_cached_teacher(make_trainer, inputs):
    batches = [(part, torch.zeros(len(part)), numbers) for part, numbers in halves(inputs)]
    thetas = []
    for cache in (None, TeacherCache(len(inputs))):
        trainer, samples = make_trainer(distillation=Distillation(KDConfig(1.0), cache=cache)), []
        handle = trainer.teacher.register_forward_hook(
            lambda module, args, output, samples=samples: samples.append(len(output))
        )
        trainer.fit(batches, epochs=3)
        handle.remove()
        assert sum(samples) == len(inputs) * (3 if cache is None else 1)
        thetas.append([gate.theta.detach().clone() for gate in trainer.gated.gates])
    assert all(torch.equal(one, other) for one, other in zip(*thetas, strict=True))


def halves(inputs):
    return zip(inputs.split(len(inputs) // 2), torch.arange(len(inputs)).split(len(inputs) // 2), strict=True)


def test_gates_are_annealed_epoch_by_epoch(make_trainer, loader):
    trainer = make_trainer(target_ms=4.0)
    for gate in trainer.gated.gates:
        gate.start_temperature, gate.final_temperature = 1.0, 0.25
    found = []

    def note(*_):
        found.append({round(gate.temperature, 6) for gate in trainer.gated.gates})

    # the gap is within 10 from the start, but gates count as converged only after annealing
    assert trainer.fit(loader, epochs=3, patience=1, converged_within=10.0, on_epoch=note) == "finished"
    assert found == [{1.0}, {0.5}, {0.25}]


@pytest.mark.parametrize("options", [{"lambda_init": -0.1}, {"lambda_lr": -1.0}])
def test_a_negative_lambda_is_refused(make_trainer, options):
    with pytest.raises(ValueError, match=r"lambda\.init .* and lambda\.lr .* must not be negative"):
        make_trainer(**options)


def test_below_the_target_latency_does_not_move_gates(make_trainer, loader):
    trainer = make_trainer(
        target_ms=8.95, lambda_init=100.0, lambda_lr=0.0, distillation=Distillation(lambda s, t: (s * 0.0).sum())
    )
    before = states(trainer.gated.gates)
    trainer.train_epoch(loader)
    assert same(before, states(trainer.gated.gates))


def test_penalties_lower_gates_and_are_reported(make_trainer, loader):
    trainer = make_trainer(
        lambda_init=0.0, penalties=[L1(5.0)], distillation=Distillation(lambda s, t: (s * 0.0).sum())
    )
    before = states(trainer.gated.gates)
    step = trainer.train_epoch(loader)
    assert 4.0 < step.penalty < 5.0 and step.kd == 0.0
    assert all(bool((gate.theta < before[f"{i}.theta"]).all()) for i, gate in enumerate(trainer.gated.gates))


def test_penalties_see_the_effective_gates(make_trainer, loader):
    """A unit is there only as far as its parent is: penalties get the product of both gates."""
    seen = []

    def penalty(gates, groups):
        seen.append({name: gate.detach().clone() for name, gate in gates.items()})
        return gates["first.hidden"].sum()

    trainer = make_trainer(penalties=[penalty], lambda_init=0.0)
    with torch.no_grad():
        trainer.gated.gate_of("first.branch").theta.zero_()  # its gate is a half
    before = {name: gate.detach().clone() for name, gate in trainer.gated.own_gates().items()}
    trainer.train_epoch(loader[:1])
    torch.testing.assert_close(seen[0]["first.hidden"], 0.5 * before["first.hidden"])
    torch.testing.assert_close(seen[0]["first.branch"], before["first.branch"])
    assert float(trainer.gated.gate_of("first.branch").theta.detach()) < 0  # so that it is the parent's loss as well


def test_only_gates_train_by_default(make_trainer, loader, toy):
    trainer = make_trainer(target_ms=4.0)
    teacher, weights, gates = states(toy), states(trainer.gated.model), states(trainer.gated.gates)
    trainer.train_epoch(loader)
    assert same(weights, states(trainer.gated.model)) and same(teacher, states(toy))
    assert not same(gates, states(trainer.gated.gates))
    assert {name for name, p in trainer.gated.named_parameters() if p.requires_grad} == {
        f"gates.{index}.theta" for index in range(4)
    }


def test_weights_train_with_an_optimizer_and_statistics_stay_frozen(make_trainer, loader, toy):
    trainer = make_trainer(target_ms=4.0, weight_lr=0.1)
    teacher, before = states(toy), states(trainer.gated.model)
    for _ in range(2):
        trainer.train_epoch(loader)
    after = states(trainer.gated.model)
    assert not any(torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    assert all(torch.equal(before[name], after[name]) for name in before if "running" in name or "tracked" in name)
    assert same(teacher, states(toy))


def test_teacher_and_student_run_in_eval_mode_however_they_come(make_trainer, loader, toy):
    expected = make_trainer(target_ms=4.0).train_epoch(loader)
    toy.train()
    trainer = make_trainer(target_ms=4.0)
    teacher, student = states(toy), states(trainer.gated.model)
    assert trainer.train_epoch(loader) == expected
    assert same(teacher, states(toy)) and same(student, states(trainer.gated.model))  # the running statistics too


def test_the_weights_see_distillation_alone(make_trainer, loader):
    """However heavy penalties and lambda are, the weights' first step is the same."""
    light = make_trainer(target_ms=4.0, weight_lr=0.1, lr=0.0)
    heavy = make_trainer(target_ms=4.0, weight_lr=0.1, lr=0.0, lambda_init=1e3, penalties=[L1(1e3)])
    for trainer in (light, heavy):
        trainer.train_epoch(loader)
    assert same(states(light.gated.model), states(heavy.gated.model))


@pytest.mark.parametrize("fraction", [0.6, 0.9])
def test_the_minimum_fraction_is_kept(make_trainer, loader, fraction):
    trainer = make_trainer(target_ms=1.0, lambda_init=50.0, lr=1.0, minimum_fraction=fraction)
    for _ in range(5):
        trainer.train_epoch(loader)
    for group, gate in zip(trainer.gated.groups, trainer.gated.gates, strict=True):
        assert float(gate.gate.detach().sum()) >= fraction * group.units - 1e-3


def test_groups_without_a_gate_count_as_full(make_trainer, groups):
    trainer = make_trainer(gated=groups[:2])
    with trainer.gated.hard_gated({"first.branch": (), "first.hidden": ()}):
        assert float(trainer.predicted_ms().detach()) == 5.0


def test_nan_stops_with_the_last_good_gates(make_trainer, inputs):
    trainer = make_trainer(target_ms=4.0, weight_lr=0.01)
    kept = []
    poisoned = torch.full_like(inputs, float("nan"))

    class Loader:
        epoch = 0

        def __iter__(self):
            self.epoch += 1
            yield (inputs,)
            if self.epoch == 3:
                yield (poisoned,)

    stopped = trainer.fit(Loader(), epochs=9, on_epoch=lambda epoch, step: kept.append(states(trainer.gated)))
    assert stopped == "nan"
    assert len(kept) == 2
    assert same(kept[-1], states(trainer.gated))


def test_a_step_that_is_not_finite_changes_nothing(make_trainer, inputs):
    trainer = make_trainer(target_ms=4.0)
    before = states(trainer.gated)
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        trainer.train_epoch([(torch.full_like(inputs, float("inf")),)])
    assert same(before, states(trainer.gated))
    assert trainer.lambda_ == 1.0


def test_empty_data_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"the training data is empty; check data\.root and data\.samples"):
        make_trainer().train_epoch([])


def test_a_probe_measures_the_sliced_student_and_adds_a_sample(make_trainer, inputs, groups):
    seen = []
    trainer = make_trainer(measure=lambda model: seen.append(model) or 7.5, policy=ExportPolicy(0.5))
    with torch.no_grad():
        trainer.gated.gate_of("first.hidden").theta[:5] = -4.0
        trainer.gated.gate_of("second.branch").theta.fill_(-4.0)
    assert trainer.probe() == trainer.measured_ms == 7.5
    expected = full_widths(groups) | {"first.hidden": 3, "second.branch": 0, "second.hidden": 0}
    assert trainer.proxy.samples == [(expected, 7.5, 1.0)]
    assert seen[0].first.up.out_features == 3 and not hasattr(seen[0].second, "up")
    assert seen[0](inputs).shape == (16, 3)


def test_a_probe_slices_with_the_given_function(make_trainer, groups):
    seen = []

    def slim(model, keep):
        seen.append(keep)
        return materialize(model, groups, keep)

    trainer = make_trainer(measure=lambda model: float(model.first.up.out_features), slim=slim, gated=groups[:2])
    with torch.no_grad():
        trainer.gated.gate_of("first.hidden").theta[:5] = -4.0
    assert trainer.probe() == 3.0
    assert seen == [
        {"first.branch": (0,), "first.hidden": (5, 6, 7), "second.branch": (0,), "second.hidden": tuple(range(8))}
    ]


def test_samples_whose_label_is_ignored_do_not_count_and_other_labels_do_not_matter(make_trainer, inputs):
    labels = torch.arange(16) % 3
    labels[8:] = IGNORED
    changed = torch.cat([inputs[:8], 5 + inputs[8:]])
    trainers = [make_trainer(target_ms=4.0) for _ in range(3)]
    loaders = [(inputs, labels)], [(changed, labels.where(labels == IGNORED, 0))], [(changed, labels * 0)]
    first, second, third = (trainer.train_epoch(loader).kd for trainer, loader in zip(trainers, loaders, strict=True))
    assert first == second != third
    assert same(states(trainers[0].gated), states(trainers[1].gated))


def test_probes_come_after_every_so_many_epochs(make_trainer, loader):
    trainer = make_trainer(measure=lambda model: 7.5)
    steps = []
    assert trainer.fit(loader, epochs=5, probe_every=2, on_epoch=lambda epoch, step: steps.append(step)) == "finished"
    assert len(trainer.proxy.samples) == 2
    assert [step.measured_ms for step in steps] == [None, None, 7.5, 7.5, 7.5]


def test_without_a_measure_function_there_is_no_measuring(make_trainer):
    with pytest.raises(ValueError, match="this trainer has no measure function; pass measure= to take real latencies"):
        make_trainer().probe()


def scripted(trainer, kds, gaps):
    """The trainer with epochs that have these losses and gaps."""
    epochs = iter([Step(kd, 0.0, 5.0, gap, 1.0) for kd, gap in zip(kds, gaps, strict=True)])
    trainer.train_epoch = lambda loader, on_step=None, max_steps=None: next(epochs)
    return trainer


@pytest.mark.parametrize(
    ("kds", "gaps", "reason", "epochs"),
    [
        ([1.0] * 6, [0.01] * 6, "settled", 3),
        ([1.0] * 6, [0.5] * 6, "finished", 6),  # the gap is never within 0.02
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], [0.01] * 6, "finished", 6),  # KD still improves
        ([1.0] * 6, [0.5, 0.5, 0.01, -0.01, 0.01, 0.01], "settled", 5),
        (
            [1.0] * 6,
            [0.01, 0.01, 0.5, 0.01, 0.5, 0.5],
            "finished",
            6,
        ),  # the gap is within 0.02, but never for long enough
    ],
)
def test_training_stops_early_when_the_gates_have_converged(make_trainer, kds, gaps, reason, epochs):
    seen = []
    trainer = scripted(make_trainer(target_ms=5.0), kds, gaps)
    stopped = trainer.fit(
        [], epochs=6, patience=2, converged_within=0.02, on_epoch=lambda epoch, step: seen.append(epoch)
    )
    assert (stopped, len(seen)) == (reason, epochs)


def test_patience_0_never_stops_early(make_trainer):
    assert scripted(make_trainer(target_ms=5.0), [1.0] * 8, [0.0] * 8).fit([], epochs=8) == "finished"


@pytest.mark.parametrize("target_ms", [4.0, 6.5])
def test_gates_converge_near_the_target(make_trainer, loader, target_ms):
    """The gap starts above 0.2; gates that oscillate around the target fail."""
    distillation = Distillation(lambda s, t: 10 * mse_reg(s, t))
    trainer = make_trainer(target_ms=target_ms, distillation=distillation, lambda_lr=0.05, lr=0.02)
    gaps = []
    trainer.fit(loader, epochs=200, on_epoch=lambda epoch, step: gaps.append(step.gap))
    assert gaps[0] > 0.2 and max(map(abs, gaps[-20:])) < 0.02
    assert trainer.lambda_ > 0


def test_a_larger_fixed_lambda_gives_a_faster_student(make_trainer, loader):
    found = []
    for fixed in (0.001, 0.01, 0.1):
        trainer = make_trainer(lambda_init=fixed, lambda_lr=0.0)
        trainer.fit(loader, epochs=100)
        found.append(float(trainer.predicted_ms().detach()))
    assert found == sorted(found, reverse=True) and found[0] > found[-1] + 1.0


def test_the_same_seed_gives_the_same_gates(make_trainer, loader):
    first, second = (make_trainer(target_ms=5.0) for _ in range(2))
    for trainer in (first, second):
        trainer.fit(loader, epochs=3)
    assert same(states(first.gated), states(second.gated))


def test_every_step_is_reported_and_the_epoch_is_their_mean(make_trainer, loader):
    steps = []
    epoch = make_trainer(target_ms=5.0).train_epoch(loader, steps.append)
    assert len(steps) == 2
    assert epoch.kd == pytest.approx(sum(step.kd for step in steps) / 2)
    assert epoch.gap == pytest.approx(sum(step.gap for step in steps) / 2)
    assert epoch.lambda_ == steps[-1].lambda_
    record = json.loads(json.dumps(epoch.as_dict()))
    assert record["lambda"] == epoch.lambda_ and "lambda_" not in record
