"""The verdict's measurement: the figures decide, what was disturbed is told, and a fresh process takes it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from hawada.adapters import Shape, save_model
from hawada.adapters.torchvision import ResNetAdapter
from hawada.core.latency import (
    Budget,
    MeasurementError,
    Rounds,
    Sampled,
)
from hawada.core.structure import keep_all
from hawada.core.verdict import Comparison, Interval, Latency, merged
from hawada.workspace import (
    Verification,
    as_dict,
    compare_in_fresh_process,
    verification as verification_module,
    verify_in_fresh_process,
)
from hawada.workspace.verification import EVERY, MAX_PASSES, SELF_CHECK, measure_verification

BUDGET = Budget(None, 0.5, 0.05)
ROUNDS = Rounds(precision=0.01, min_rounds=5, max_rounds=10, max_seconds=1.0)
WANDERING = np.linspace(0.8, 1.2, 40)  # of the clock, together for all samples of a round


def compared(median: float, half: float = 0.0, *, source: str = "measured") -> Comparison:
    """A comparison whose ratio is median +- half, of a teacher that takes 10 ms."""
    low, high = median - half, median + half
    teacher = Latency(10.0, 10.0, 10.0, 10.0, 5)
    slim = Latency(10 * median, 10 * low, 10 * high, 10 * high, 5)
    return Comparison(teacher, slim, Interval(median, low, high), source, (f"note {median}",))


def sampled(
    ratio: float,
    spread: float = 0.0,
    *,
    itself: float = 1.0,
    disturbed: float | None = None,
    lost: int = 0,
    needed: int = 5,
    broken: str | None = None,
) -> Sampled:
    """Forty rounds of (teacher, its copy, slim model).

    Args:
        ratio: of slim model to teacher in the rounds that count, ratio +- spread.
        spread: how far it is spread.
        itself: ratio of the copy to the teacher.
        disturbed: ratio of slim model to teacher in rounds that do not count.
        lost: how many of the forty do not count.
        needed: how many must count.
        broken: why no verdict may rest on any.
    """
    ratios = ratio + spread * np.resize([-1.0, 1.0, -0.5, 0.5], 40)
    counts = np.arange(40) >= lost
    if disturbed is not None:
        ratios = np.where(counts, ratios, disturbed)
    teacher = 10 * WANDERING
    discarded = f"{lost} of 40 rounds discarded (the threads ran apart)" if lost else None
    notes = (f"note {ratio}",)
    rows = np.stack([teacher, itself * teacher, ratios * teacher], axis=1)
    return Sampled(rows, counts, needed, notes, discarded, broken)


class Script:
    """Stands in for a machine: measurements come as written, and the last one again and again."""

    def __init__(self, *found: Sampled | Exception) -> None:
        self.found, self.asked = list(found), []

    def __call__(self, models: Sequence[nn.Module], rounds: Rounds) -> Sampled:
        self.asked.append((models, rounds))
        found = self.found[min(len(self.asked), len(self.found)) - 1]
        if isinstance(found, Exception):
            raise found
        return found


def verified(*found: Sampled | Exception, repeats: int = 1, budget: Budget = BUDGET) -> tuple[Verification, Script]:
    script = Script(*found)
    teacher, slim = nn.Linear(2, 2), nn.Linear(2, 1)
    verification = measure_verification(script, teacher, slim, budget=budget, rounds=ROUNDS, repeats=repeats)
    for (first, copied, last), _ in script.asked:
        assert first is teacher and last is slim
        assert copied is not teacher and torch.equal(copied.weight, teacher.weight)
    return verification, script


def verdict(verification: Verification) -> tuple[str, str]:
    return BUDGET.verdict(verification.or_else(compared(0.3)), verification.every)


def test_a_quiet_machine_gives_a_verdict_at_once() -> None:
    verification, script = verified(sampled(0.48, 0.01))
    assert verdict(verification)[0] == "met" and verification.failed is None
    assert list(verification.measured) == ["repeat_1", EVERY, SELF_CHECK] and len(script.asked) == 1
    assert verification.measured[SELF_CHECK].ratio.median == 1.0
    assert verdict(verified(sampled(0.53, 0.01))[0])[0] == "missed"


@pytest.mark.parametrize("ratio", [0.93, 1.07])
def test_a_machine_on_which_a_model_differs_from_itself_gives_no_verdict(ratio: float) -> None:
    verification, script = verified(sampled(0.3, itself=ratio))
    assert verdict(verification) == (
        "unverified",
        "noisy: the same model differs from itself by 7.0%, and 5.0% is tolerated",
    )
    assert len(script.asked) == MAX_PASSES
    assert verdict(verified(sampled(0.3, itself=1 + (ratio - 1) / 2))[0])[0] == "met"


def test_the_interval_of_the_self_check_counts_and_not_its_median() -> None:
    unsteady = sampled(0.3)
    unsteady.rows[:, 1] *= np.resize([0.9, 1.1], 40)
    verification, _ = verified(unsteady)
    assert verification.measured[SELF_CHECK].ratio.median == pytest.approx(1.0, abs=0.03)
    assert verdict(verification)[0] == "unverified" and "differs from itself" in verdict(verification)[1]


@pytest.mark.parametrize("lost", [0, 22, 28])
@pytest.mark.parametrize(("ratio", "expected"), [(0.48, "met"), (0.53, "missed")])
def test_many_discarded_rounds_do_not_veto_clear_figures(ratio: float, expected: str, lost: int) -> None:
    verification, script = verified(sampled(ratio, 0.01, lost=lost, disturbed=ratio + 0.005))
    assert verdict(verification)[0] == expected and len(script.asked) == 1


@pytest.mark.parametrize(("counted", "disturbed"), [(0.48, 0.6), (0.53, 0.4)])
def test_rounds_that_count_and_all_rounds_that_disagree_are_measured_for_longer(
    counted: float, disturbed: float
) -> None:
    odd = sampled(counted, 0.01, lost=30, disturbed=disturbed)
    verification, script = verified(odd)
    assert verdict(verification)[0] == "unverified" and len(script.asked) == MAX_PASSES
    assert "with the rounds that were disturbed" in verdict(verification)[1]
    quiet, script = verified(odd, sampled(counted, 0.01))
    assert verdict(quiet)[0] == ("met" if counted < 0.5 else "missed") and len(script.asked) == 2


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.3, "met"), (0.45, "unverified"), (0.55, "unverified"), (0.8, "missed")]
)
def test_disturbed_rounds_alone_must_be_far_from_the_target(ratio: float, expected: str) -> None:
    verification, script = verified(sampled(ratio, 0.01, lost=38, disturbed=ratio))
    assert verdict(verification)[0] == expected
    assert len(script.asked) == (MAX_PASSES if expected == "unverified" else 1)
    assert any(note.startswith("too few rounds were undisturbed") for note in verification.comparison.notes)


def test_rounds_that_count_add_up_over_the_passes() -> None:
    verification, script = verified(sampled(0.48, 0.01, lost=26, disturbed=0.48, needed=30))
    assert verdict(verification)[0] == "met" and len(script.asked) == 3  # 14 of each 40, and 30 are needed
    assert verification.comparison.ratio.low > 0.46  # of the rounds that count: nothing is widened


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", [0.525, 0.475])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95, 1.0])
def test_a_disturbance_that_moves_the_ratio_makes_no_verdict_wrong(share: float, target: float, seed: int) -> None:
    """The truth is 0.5; disturbed rounds, most of them told, tend to either side; the clock has two speeds."""
    random = np.random.default_rng(seed)
    bias = random.choice([0.8, 0.9, 1.1, 1.2])

    def measure(models: Sequence[nn.Module], rounds: Rounds) -> Sampled:
        count = 60
        speed = np.where(random.random(count) < 0.5, 10.0, 14.0)[:, None]
        noise = 1 + 0.02 * random.standard_normal((count, 3))
        hit = random.random(count) < share
        rows = speed * np.array([1.0, 1.0, 0.5]) * noise
        rows[hit, 2] *= bias
        told = hit & (random.random(count) < 0.95)
        discarded = f"{told.sum()} of {count} rounds discarded (others)" if told.any() else None
        return Sampled(rows, ~told, 10, (), discarded)

    budget = Budget(None, target, 0.06)
    models = nn.Linear(2, 2), nn.Linear(2, 1)
    verification = measure_verification(measure, *models, budget=budget, rounds=ROUNDS, repeats=1)
    found, _ = budget.verdict(verification.or_else(compared(0.3)), verification.every)
    assert found in ("unverified", "met" if target > 0.5 else "missed")
    assert share > 0.05 or found != "unverified"


@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_one_repeat_on_which_nothing_may_rest_spoils_the_verdict(spoiled: int) -> None:
    repeats = [sampled(0.3, broken="other processes compute" if index == spoiled else None) for index in range(3)]
    verification, script = verified(*repeats, repeats=3)
    assert verdict(verification) == ("unverified", "noisy: other processes compute")
    assert len(script.asked) == 3  # measuring for longer would not help


LOST = [
    torch.AcceleratorError("CUDA error: device lost\nmore"),
    RuntimeError("CUDA error: device lost"),
    MeasurementError("device lost"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_device_that_is_lost_on_the_way_is_never_met(error: Exception, finished: int) -> None:
    found = [sampled(0.2), sampled(0.25)][:finished]
    verification, _ = verified(*found, error, repeats=3)
    ruling, why = verdict(verification)
    assert ruling == "unverified" and "measuring broke off" in why and "device lost" in why and "\n" not in why
    assert len([name for name in verification.measured if name.startswith("repeat")]) == finished  # that was kept
    median = verification.or_else(compared(0.3)).ratio.median
    assert median == pytest.approx((0.3, 0.2, 0.225)[finished])


def test_a_mistake_of_the_user_is_not_taken_for_a_lost_device() -> None:
    with pytest.raises(ValueError, match="runtime=eager"):
        verified(ValueError("runtime: Net cannot be captured; use runtime=eager"))


def test_what_straddles_the_target_is_measured_for_longer_and_within_the_patience() -> None:
    straddling = sampled(0.5, 0.02)
    verification, script = verified(straddling, sampled(0.48, 0.005))
    assert verdict(verification)[0] == "met"
    assert list(verification.measured) == ["repeat_1", EVERY, SELF_CHECK] and len(script.asked) > 1
    assert verification.comparison.baseline.samples == 40 * len(script.asked)
    (_, first), (_, longer) = script.asked[:2]
    assert first == ROUNDS and longer.max_rounds > first.max_rounds and longer.precision < first.precision
    assert longer.max_seconds == first.max_seconds and longer.patience_s < first.patience_s
    again, script = verified(straddling)
    assert verdict(again)[0] == "unverified" and len(script.asked) == MAX_PASSES


def test_without_a_target_nothing_is_measured_for_longer() -> None:
    verification, script = verified(sampled(0.5, 0.02), budget=Budget(None, None, 0.05))
    assert len(script.asked) == 1 and verification.comparison.ratio.median == pytest.approx(0.5)


def test_repeats_are_combined_conservatively() -> None:
    one, two, three = compared(0.48, 0.01), compared(0.44, 0.02), compared(0.47, 0.04)
    whole = merged([one, two, three], ends="widest")
    assert (whole.ratio.median, whole.ratio.low, whole.ratio.high) == pytest.approx((0.47, 0.42, 0.51))
    assert whole.candidate.high == pytest.approx(5.1) and whole.baseline.samples == 15
    assert set(whole.notes) == {"note 0.48", "note 0.44", "note 0.47"}
    repeats = [sampled(0.48), sampled(0.44), sampled(0.51)]
    verification, script = verified(*repeats * MAX_PASSES, repeats=3)
    assert verdict(verification)[0] == "unverified"  # two of three would have met it
    assert len(script.asked) == 3 * MAX_PASSES
    assert merged([one], ends="widest") == one


def test_the_record_holds_every_round_and_whether_it_counts() -> None:
    found = sampled(0.4, 0.01, lost=3, disturbed=0.5)
    verification, _ = verified(found)
    (part,) = json.loads(json.dumps(as_dict(verification)))["rounds"]
    assert part["ms"] == found.rows.tolist() and part["counts"] == [False] * 3 + [True] * 37
    record = as_dict(Verification(None, failed="lost"))
    assert (record["comparison"], record["every"], record["failed"]) == (None, None, "lost")


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.2, "met"), (0.45, "unverified"), (0.55, "unverified"), (3.0, "unverified")]
)
def test_milliseconds_of_disturbed_rounds_never_miss_a_target(ratio: float, expected: str) -> None:
    """Others slow teacher and slim model alike: the ratio holds, and the milliseconds grow without bound."""
    budget = Budget(5.0, None, 0.05)
    verification, _ = verified(sampled(ratio, 0.01, lost=38, disturbed=ratio), budget=budget)
    assert budget.verdict(verification.comparison, verification.every)[0] == expected
    quiet, _ = verified(sampled(0.55, 0.001), budget=budget)
    quiet_ms = quiet.comparison.candidate
    assert quiet_ms.low > 0 and quiet.every.candidate == quiet_ms


CLOCKS = '''
"""Clocks of an outside package."""

import os


class Clock:
    """A microsecond per parameter."""

    simulated = False

    def prepare(self, model, inputs):
        assert not model.training and inputs[0].shape == (2, 3, 16, 16)
        return lambda: 1e-3 * sum(parameter.numel() for parameter in model.parameters())


class Nonsense(Clock):
    """No number."""

    def prepare(self, model, inputs):
        return lambda: float("nan")


class Lost(Clock):
    """Measures the teacher, and is then gone."""

    prepared = 0

    def prepare(self, model, inputs):
        self.prepared += 1
        if self.prepared > 1:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return super().prepare(model, inputs)


class Killed(Clock):
    """Takes the whole process with it."""

    def prepare(self, model, inputs):
        os._exit(7)
'''


SPEC: dict[str, Any] = {"arch": "basic", "layers": [1, 1, 1, 1], "num_classes": 10, "image_size": 16}
TARGET = {"_target_": "hawada.adapters.torchvision.resnet.ResNetAdapter"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved teacher and a slim model."""
    folder = tmp_path_factory.mktemp("models")
    adapter = ResNetAdapter(**SPEC)
    teacher = adapter.skeleton()
    groups = adapter.groups(teacher)
    keeps: dict[str, dict[str, Sequence[int]]] = {"teacher": {}, "slim": {"layer4.0.conv1": range(64)}}
    for name, changes in keeps.items():
        keep = keep_all(groups) | {group: tuple(kept) for group, kept in changes.items()}
        save_model(
            folder / name,
            adapter.slim(teacher, groups, keep),
            adapter=adapter,
            adapter_spec={**TARGET, **SPEC},
            teacher=teacher,
            groups=groups,
            keep=keep,
        )
    return folder


@pytest.fixture
def saved(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that verifies them with a clock of an outside package."""
    adapter = ResNetAdapter(**SPEC)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "outside_clocks.py").write_text(CLOCKS)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    watch = SimpleNamespace(
        cfg=OmegaConf.create({"gpu": {"clock": {"_target_": ""}, "dtype": "float32"}, "seed": 0}),
        inputs=lambda: adapter.example_inputs(Shape(2)),
        device=torch.device("cpu"),
        subject=SimpleNamespace(trust=[TARGET["_target_"]]),
        shape=Shape(2),
        rounds=ROUNDS,
        handover_us=None,
        budget=Budget(None, 0.9, 0.05),
        budget_for=lambda ratio: Budget(None, ratio, 0.05),
    )

    def place(clock: str) -> tuple[Any, Path, Path, Path]:
        watch.cfg.gpu.clock._target_ = f"outside_clocks.{clock}"
        folder = tmp_path / clock
        folder.mkdir()
        return watch, models / "teacher", models / "slim", folder

    def verify(clock: str) -> tuple[Verification, Path]:
        asked = place(clock)
        return verify_in_fresh_process(*asked), asked[-1]

    def measure(clock: str) -> tuple[Comparison, Path]:
        asked = place(clock)
        return compare_in_fresh_process(*asked), asked[-1]

    return SimpleNamespace(verify=verify, measure=measure, budget=watch.budget)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what the fresh process would do, without the seconds that its imports take."""

    def run(command: Sequence[str], **_: Any) -> SimpleNamespace:
        verification_module.main(Path(command[-1]))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(verification_module, "prepare_cpu", lambda threads: None)
    monkeypatch.setattr(verification_module.subprocess, "run", run)
    monkeypatch.delitem(sys.modules, "outside_clocks", raising=False)


def test_saved_models_are_verified_in_a_fresh_process(saved: Any) -> None:
    verification, folder = saved.verify("Clock")
    assert verification.failed is None and verification.comparison.noisy is None
    teacher, slim = verification.comparison.baseline.median, verification.comparison.candidate.median
    assert 0.3 < slim / teacher < 0.9 and verification.measured[SELF_CHECK].ratio.median == 1.0
    assert saved.budget.verdict(verification.comparison)[0] == "met"
    record = json.loads((folder / "verification.json").read_text())
    assert record["environment"]["fingerprint"]["device"] == "cpu"
    assert record["rounds"][0]["ms"][0] == [teacher, teacher, slim]
    assert [path.name for path in folder.iterdir()] == ["verification.json"]


def test_a_search_measures_once(saved: Any, in_this_process: None) -> None:
    comparison, folder = saved.measure("Clock")
    assert comparison.noisy is None and 0.3 < comparison.ratio.median < 0.9
    assert list(json.loads((folder / "verification.json").read_text())["measured"]) == ["repeat_1", EVERY]


def test_a_search_cannot_go_on_without_a_measurement(saved: Any, in_this_process: None) -> None:
    with pytest.raises(MeasurementError, match="a timing that was not finite or not positive"):
        saved.measure("Nonsense")


@pytest.mark.parametrize(
    ("clock", "reason"),
    [
        ("Nonsense", "a timing that was not finite or not positive"),
        ("Lost", "measuring broke off (RuntimeError: CUDA error: unspecified launch failure)"),
    ],
)
def test_whatever_happens_while_it_is_measured_the_verdict_is_unverified_with_the_reason(
    clock: str, reason: str, saved: Any, in_this_process: None
) -> None:
    verification, folder = saved.verify(clock)
    ruling, why = saved.budget.verdict(verification.or_else(compared(0.1)))
    assert ruling == "unverified" and reason in why
    assert os.listdir(folder) == ["verification.json"]


def test_whatever_happens_to_that_process_the_verdict_is_unverified_with_the_reason(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    verification, folder = saved.verify("Killed")
    ruling, why = saved.budget.verdict(verification.or_else(compared(0.1)))
    assert ruling == "unverified" and "the measuring process ended with exit code 7" in why
    assert os.listdir(folder) == []
    monkeypatch.setattr(verification_module, "verify_in_fresh_process", lambda *_, **__: verification)
    with pytest.raises(MeasurementError, match="the measuring process ended with exit code 7"):
        saved.measure("Clock")
