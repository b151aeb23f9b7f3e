"""Which verdicts are a success, and that a verdict is written as its plain name."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hawada.core.verdict import Comparison, Interval, Latency, Verdict, merged

SUCCESSES = {"met", "already_met", "simulated"}


@pytest.mark.parametrize("verdict", Verdict)
def test_only_what_held_its_target_is_a_success(verdict: Verdict) -> None:
    assert verdict.is_success == (verdict.value in SUCCESSES)
    assert verdict.may_be_published == (verdict.value in {*SUCCESSES, "unverified"})


def test_there_are_six_verdicts_and_json_holds_their_names() -> None:
    assert {*Verdict} == {*SUCCESSES, "missed", "unverified", "infeasible"}
    assert json.dumps([Verdict.MET]) == '["met"]' and f"{Verdict.ALREADY_MET}" == "already_met"
    with pytest.raises(ValueError, match="'fine' is not a valid Verdict"):
        Verdict("fine")


def test_a_comparison_comes_back_from_json_as_it_was() -> None:
    teacher, slim = Latency(1.1, 1.0, 1.2, 1.3, 7), Latency(0.55, 0.5, 0.6, 0.65, 7)
    comparison = Comparison(teacher, slim, Interval(0.5, 0.1 + 0.2, 0.6), "simulated", ("a note",), "hot")
    assert Comparison.from_dict(json.loads(json.dumps(comparison.as_dict()))) == comparison
    assert comparison.simulated


def test_what_is_measured_again_is_averaged_and_what_is_repeated_keeps_its_widest_ends() -> None:
    def measured(ratio: float, spread: float, noisy: str | None = None) -> Comparison:
        interval = Interval(ratio, ratio - spread, ratio + spread)
        slim = Latency(10 * ratio, 10 * (ratio - spread), 10 * (ratio + spread), 20 * ratio, 5)
        return Comparison(Latency(10.0, 9.0, 11.0, 12.0, 5), slim, interval, notes=(f"{ratio}",), noisy=noisy)

    both = [measured(0.5, 0.02), measured(0.6, 0.04, "hot")]
    mean, widest = merged(both, ends="mean"), merged(both, ends="widest")
    assert (mean.ratio.median, mean.ratio.low, mean.ratio.high) == pytest.approx((0.55, 0.52, 0.58))
    assert (widest.ratio.median, widest.ratio.low, widest.ratio.high) == pytest.approx((0.55, 0.48, 0.64))
    for whole in (mean, widest):
        assert (whole.candidate.p95, whole.candidate.samples) == (12.0, 10) and whole.candidate.median == 5.5
        assert whole.notes == ("0.5", "0.6") and whole.noisy == "hot"
    assert merged(both[:1], ends="mean") == both[0]


def test_verdicts_start_without_torch() -> None:
    script = "import sys, hawada.core.verdict; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
