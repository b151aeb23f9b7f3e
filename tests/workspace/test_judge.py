"""The verdict's measurement: what spoils it is told and never judged, and a fresh process takes it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
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
from hawada.core.latency import Budget, Comparison, Interval, Latency, MeasurementError, Rounds, summarize
from hawada.core.structure import keep_all
from hawada.workspace import Judgement, as_dict, judge as judge_module, judge_afresh, measure_afresh
from hawada.workspace.judge import SELF_CHECK, combine, measure_judgement

BUDGET = Budget(None, 0.5, 0.05)
ROUNDS = Rounds(precision=0.01, min_rounds=5, max_rounds=10, max_seconds=1.0)


def compared(median: float, half: float = 0.0, *, noisy: str | None = None, source: str = "measured") -> Comparison:
    """A comparison whose ratio is median +- half, of a teacher that takes 10 ms."""
    low, high = median - half, median + half
    teacher = Latency(10.0, 10.0, 10.0, 10.0, 5)
    slim = Latency(10 * median, 10 * low, 10 * high, 10 * high, 5)
    return Comparison(teacher, slim, Interval(median, low, high), source, (f"note {median}",), noisy)


class Script:
    """Stands in for a machine: the first comparison is the self-check, the others come as written."""

    def __init__(self, *found: Comparison | Exception) -> None:
        self.found, self.asked = list(found), []

    def __call__(self, baseline: nn.Module, candidate: nn.Module, rounds: Rounds) -> Comparison:
        self.asked.append((baseline, candidate, rounds))
        said = self.found[len(self.asked) - 1]
        if isinstance(said, Exception):
            raise said
        return said


def judged(*found: Comparison | Exception, repeats: int = 1, budget: Budget = BUDGET) -> tuple[Judgement, Script]:
    script = Script(*found)
    teacher, slim = nn.Linear(2, 2), nn.Linear(2, 1)
    judgement = measure_judgement(script, teacher, slim, budget=budget, rounds=ROUNDS, repeats=repeats)
    check = script.asked[0]
    assert check[0] is teacher and check[1] is not teacher and type(check[1]) is nn.Linear
    assert all((baseline, candidate) == (teacher, slim) for baseline, candidate, _ in script.asked[1:])
    return judgement, script


def verdict(judgement: Judgement) -> tuple[str, str]:
    return BUDGET.verdict(judgement.or_else(compared(0.3)))


def test_a_quiet_machine_is_judged() -> None:
    judgement, script = judged(compared(1.0), compared(0.48, 0.01))
    assert verdict(judgement)[0] == "met" and judgement.failed is None
    assert list(judgement.measured) == [SELF_CHECK, "repeat_1"] and len(script.asked) == 2


@pytest.mark.parametrize("ratio", [0.93, 1.07])
def test_a_machine_on_which_a_model_differs_from_itself_judges_nothing(ratio: float) -> None:
    judgement, _ = judged(compared(ratio), compared(0.3))
    assert verdict(judgement) == (
        "unverified",
        "noisy: the same model differs from itself by 7.0%, and 5.0% is tolerated",
    )
    assert verdict(judged(compared(1 + (ratio - 1) / 2), compared(0.3))[0])[0] == "met"


def test_a_self_check_that_cannot_be_judged_is_no_self_check() -> None:
    assert verdict(judged(compared(1.0, noisy="the GPU was hot"), compared(0.3))[0]) == (
        "unverified",
        "noisy: the GPU was hot",
    )


@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_one_noisy_repeat_spoils_the_verdict(spoiled: int) -> None:
    repeats = [compared(0.3, noisy="other processes compute" if index == spoiled else None) for index in range(3)]
    judgement, script = judged(compared(1.0), *repeats, repeats=3)
    assert verdict(judgement) == ("unverified", "noisy: other processes compute")
    assert len(script.asked) == 4  # measuring for longer would not help


LOST = [
    torch.AcceleratorError("CUDA error: device lost\nmore"),
    RuntimeError("CUDA error: device lost"),
    MeasurementError("device lost"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("finished", [0, 1, 2, 3])
def test_a_device_that_is_lost_on_the_way_is_never_met(error: Exception, finished: int) -> None:
    found = [compared(1.0), compared(0.2), compared(0.25)][:finished]
    judgement, _ = judged(*found, error, repeats=3)
    said, why = verdict(judgement)
    assert said == "unverified" and "measuring broke off" in why and "device lost" in why and "\n" not in why
    assert len(judgement.measured) == finished  # what was measured before is kept
    earlier = compared(0.3)
    assert judgement.or_else(earlier).ratio.median == (earlier.ratio.median, earlier.ratio.median, 0.2, 0.225)[finished]


def test_a_mistake_of_the_user_is_not_taken_for_a_lost_device() -> None:
    with pytest.raises(ValueError, match="runtime=eager"):
        judged(ValueError("runtime: Net cannot be captured; use runtime=eager"))


def test_what_straddles_the_target_is_measured_once_more_and_for_longer() -> None:
    judgement, script = judged(compared(1.0), compared(0.49, 0.02), compared(0.49, 0.005))
    assert verdict(judgement)[0] == "met"
    assert list(judgement.measured) == [SELF_CHECK, "repeat_1", "longer_1"]
    first, longer = script.asked[1][2], script.asked[2][2]
    assert first == ROUNDS and longer.max_rounds > first.max_rounds and longer.precision < first.precision
    again, script = judged(compared(1.0), compared(0.49, 0.02), compared(0.49, 0.02))
    assert verdict(again)[0] == "unverified" and len(script.asked) == 3


def test_repeats_are_combined_conservatively() -> None:
    one, two, three = compared(0.48, 0.01), compared(0.44, 0.02), compared(0.47, 0.04)
    whole = combine([one, two, three])
    assert (whole.ratio.median, whole.ratio.low, whole.ratio.high) == pytest.approx((0.47, 0.42, 0.51))
    assert whole.candidate.high == pytest.approx(5.1) and whole.baseline.samples == 15
    assert set(whole.notes) == {"note 0.48", "note 0.44", "note 0.47"}
    judgement, _ = judged(compared(1.0), one, two, three, one, two, three, repeats=3)
    assert verdict(judgement)[0] == "unverified"  # two of three would have met it
    assert combine([one]) == replace(one, samples=None)


def test_the_record_holds_every_sample() -> None:
    samples = np.array([[10.0, 4.0], [11.0, 5.0]])
    teacher, slim = summarize(samples[:, 0]), summarize(samples[:, 1])
    measured = {SELF_CHECK: Comparison(teacher, slim, Interval(0.4, 0.4, 0.5), samples=samples)}
    record = json.loads(json.dumps(as_dict(Judgement(None, "lost", measured))))
    assert record["measured"][SELF_CHECK]["samples_ms"] == samples.tolist()
    assert (record["comparison"], record["failed"]) == (None, "lost")


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
    """Measures the self-check, and is then gone."""

    prepared = 0

    def prepare(self, model, inputs):
        self.prepared += 1
        if self.prepared > 2:
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
    """A function that judges them with a clock of an outside package."""
    adapter = ResNetAdapter(**SPEC)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "outside_clocks.py").write_text(CLOCKS)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    work = SimpleNamespace(
        cfg=OmegaConf.create({"gpu": {"clock": {"_target_": ""}, "dtype": "float32"}, "seed": 0}),
        inputs=lambda: adapter.example_inputs(Shape(2)),
        device=torch.device("cpu"),
        trust=[TARGET["_target_"]],
        shape=Shape(2),
        rounds=ROUNDS,
        handover_us=None,
        budget=Budget(None, 0.9, 0.05),
        budget_for=lambda ratio: Budget(None, ratio, 0.05),
    )

    def place(clock: str) -> tuple[Any, Path, Path, Path]:
        work.cfg.gpu.clock._target_ = f"outside_clocks.{clock}"
        folder = tmp_path / clock
        folder.mkdir()
        return work, models / "teacher", models / "slim", folder

    def judge(clock: str) -> tuple[Judgement, Path]:
        asked = place(clock)
        return judge_afresh(*asked), asked[-1]

    def measure(clock: str) -> tuple[Comparison, Path]:
        asked = place(clock)
        return measure_afresh(*asked), asked[-1]

    return SimpleNamespace(judge=judge, measure=measure, budget=work.budget)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what the fresh process would do, without the seconds that its imports take."""

    def run(command: Sequence[str], **_: Any) -> SimpleNamespace:
        judge_module.main(Path(command[-1]))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(judge_module, "prepare_cpu", lambda threads: None)
    monkeypatch.setattr(judge_module.subprocess, "run", run)
    monkeypatch.delitem(sys.modules, "outside_clocks", raising=False)


def test_saved_models_are_judged_in_a_fresh_process(saved: Any) -> None:
    judgement, folder = saved.judge("Clock")
    assert judgement.failed is None and judgement.comparison.noisy is None
    teacher, slim = judgement.comparison.baseline.median, judgement.comparison.candidate.median
    assert 0.3 < slim / teacher < 0.9 and judgement.measured[SELF_CHECK].ratio.median == 1.0
    assert saved.budget.verdict(judgement.comparison)[0] == "met"
    record = json.loads((folder / "judgement.json").read_text())
    assert record["environment"]["fingerprint"]["device"] == "cpu"
    assert record["measured"]["repeat_1"]["samples_ms"][0] == [teacher, slim]
    assert [path.name for path in folder.iterdir()] == ["judgement.json"]


def test_a_search_measures_once(saved: Any, in_this_process: None) -> None:
    comparison, folder = saved.measure("Clock")
    assert comparison.noisy is None and 0.3 < comparison.ratio.median < 0.9
    assert list(json.loads((folder / "judgement.json").read_text())["measured"]) == ["repeat_1"]


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
    judgement, folder = saved.judge(clock)
    said, why = saved.budget.verdict(judgement.or_else(compared(0.1)))
    assert said == "unverified" and reason in why
    assert os.listdir(folder) == ["judgement.json"]


def test_whatever_happens_to_that_process_the_verdict_is_unverified_with_the_reason(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judgement, folder = saved.judge("Killed")
    said, why = saved.budget.verdict(judgement.or_else(compared(0.1)))
    assert said == "unverified" and "the measuring process ended with exit code 7" in why
    assert os.listdir(folder) == []
    monkeypatch.setattr(judge_module, "judge_afresh", lambda *_, **__: judgement)
    with pytest.raises(MeasurementError, match="the measuring process ended with exit code 7"):
        saved.measure("Clock")
