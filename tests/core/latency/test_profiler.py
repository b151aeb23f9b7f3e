import json
import math
import time

import numpy as np
import pytest
import torch
from torch import nn

from hawada.core.latency import (
    DeviceClock,
    MeasurementError,
    Rounds,
    bootstrap_median,
    compare,
    comparison_of,
    measure_latency_ms,
    measure_together,
    summarize,
    widened,
)
from hawada.core.latency.monitor import Conditions
from hawada.core.latency.profiler import measure_rounds, relative_medians, sample_rounds
from hawada.core.verdict import Comparison, Interval

ROUNDS = Rounds(precision=0.0, min_rounds=9, max_rounds=60, max_seconds=60.0)


class DriftingClock:
    """Knows each model's time; the machine's speed wanders by +-40 % and jitters by 2 %."""

    simulated = False

    def __init__(self, times):
        self.times, self.calls, self.random = times, 0, np.random.default_rng(0)

    def prepare(self, model, inputs):
        def sample():
            self.calls += 1
            drift = 1 + 0.4 * math.sin(self.calls / 25)
            return self.times[model] * drift * (1 + 0.02 * self.random.standard_normal())

        return sample


@pytest.fixture
def pair():
    return nn.Identity(), nn.Identity()


def test_bootstrap_is_deterministic_and_surrounds_the_median():
    samples = np.random.default_rng(1).normal(10.0, 1.0, 50)
    first = bootstrap_median(samples)
    assert first == bootstrap_median(samples.copy())
    assert first.low < first.median < first.high
    assert first.median == float(np.median(samples))


def test_bootstrap_covers_the_true_median():
    random = np.random.default_rng(2)
    intervals = [bootstrap_median(random.lognormal(0.0, 0.5, 31), resamples=300) for _ in range(200)]
    covered = sum(interval.low <= 1.0 <= interval.high for interval in intervals)
    assert 180 <= covered <= 199  # 95 % of 200, give or take; all 200 would mean needlessly wide intervals


def test_more_samples_narrow_the_interval():
    samples = np.random.default_rng(3).normal(10.0, 1.0, 400)
    assert bootstrap_median(samples).half_width < 0.5 * bootstrap_median(samples[:25]).half_width


def test_half_width_is_relative():
    assert Interval(10.0, 9.0, 12.0).half_width == pytest.approx(0.15)
    assert Interval(10.0, 9.0, 12.0).as_dict() == {"median": 10.0, "low": 9.0, "high": 12.0}


def test_summary_by_hand():
    latency = summarize(np.array([1.0, 2.0, 3.0, 4.0, 100.0]))
    assert (latency.median, latency.samples) == (3.0, 5)
    assert latency.p95 == pytest.approx(4.0 + 0.8 * 96.0)


def test_drift_of_tens_of_percent_does_not_hide_the_ratio(pair):
    teacher, slim = pair
    clock = DriftingClock({teacher: 10.0, slim: 4.2})
    found = compare(teacher, slim, (torch.zeros(1),), clock, rounds=ROUNDS)
    assert found.ratio.median == pytest.approx(0.42, rel=0.01)
    assert found.ratio.low <= 0.42 <= found.ratio.high
    assert found.ratio.half_width < 0.01 < found.baseline.half_width  # unpaired, the drift would have drowned it
    assert found.simulated is False
    assert found.as_dict()["ratio"]["median"] == found.ratio.median


def test_comparing_a_model_with_itself_gives_one(pair):
    clock = DriftingClock({pair[0]: 3.0})
    ratio = compare(pair[0], pair[0], (torch.zeros(1),), clock, rounds=ROUNDS).ratio
    assert ratio.low <= 1.0 <= ratio.high


def test_many_modules_are_tied_to_the_first():
    names = {"full": 8.0, "half": 4.0, "tiny": 0.5}
    models = {name: nn.Identity() for name in names}
    clock = DriftingClock({models[name]: ms for name, ms in names.items()})
    inputs = dict.fromkeys(names, (torch.zeros(1),))
    found = relative_medians(models, inputs, clock, ROUNDS)
    assert found["half"] / found["full"] == pytest.approx(0.5, rel=0.02)
    assert found["tiny"] / found["full"] == pytest.approx(0.0625, rel=0.02)


def test_every_round_samples_each_once_in_an_order_that_changes_and_repeats_by_seed():
    def orders(seed):
        calls = []
        samplers = [lambda i=i: calls.append(i) or float(i + 1) for i in range(3)]
        table = sample_rounds(samplers, Rounds(0.0, 5, 8, 60.0), seed)
        return table, [tuple(calls[start : start + 3]) for start in range(0, len(calls), 3)]

    table, rounds = orders(0)
    assert table.tolist() == [[1.0, 2.0, 3.0]] * len(rounds)
    assert all(sorted(order) == [0, 1, 2] for order in rounds)
    assert len(set(rounds)) > 1
    assert rounds == orders(0)[1] and rounds != orders(1)[1]


@pytest.mark.parametrize(("noise", "precision", "expected"), [(0.0, 0.01, 9), (0.3, 1e-9, 20)])
def test_measuring_stops_at_the_precision_or_at_the_most_rounds(noise, precision, expected):
    random = np.random.default_rng(0)
    samplers = [lambda: 1.0, lambda: 2.0 + noise * random.random()]
    assert len(sample_rounds(samplers, Rounds(precision, 9, 20, 60.0))) == expected
    assert len(sample_rounds(samplers[1:], Rounds(precision, 9, 20, 60.0))) == expected


def test_no_round_begins_after_the_time_is_over():
    random = np.random.default_rng(0)
    samplers = [lambda: 1.0, random.random]
    assert len(sample_rounds(samplers, Rounds(1e-9, min_rounds=5, max_rounds=50, max_seconds=0.0))) == 5


def test_a_timing_that_is_no_time_is_discarded_and_counted():
    bad = {2: math.nan, 4: math.inf, 5: -1.0, 6: 0.0}
    calls = iter(range(100))
    found = measure_rounds([lambda: bad.get(next(calls), 3.0)], Rounds(0.0, 9, 9, 60.0))
    assert found.samples.tolist() == [[3.0]] * 9
    assert found.noisy == "4 of 13 rounds had a timing that was not finite or not positive"


def test_nothing_but_nonsense_is_an_error_and_does_not_go_on_for_ever():
    calls = []
    with pytest.raises(MeasurementError, match="16 of 16 rounds had a timing that was not finite"):
        measure_rounds([lambda: calls.append(0) or math.nan], Rounds(0.0, 4, 8, 60.0))
    assert len(calls) == 16


def test_on_a_device_where_nothing_runs_zero_is_a_time():
    found = measure_rounds([lambda: 0.0], Rounds(0.0, 4, 4, 60.0), zero_ok=True)
    assert found.noisy is None and found.samples.tolist() == [[0.0]] * 4


class Objecting:
    """A monitor that objects to the rounds it is told to."""

    def __init__(self, objections, conditions):
        self.objections, self.conditions, self.rounds = objections, conditions, 0

    def start(self):
        self.rounds = 0

    def settle(self, limit_s):
        return 0.0

    def check(self):
        self.rounds += 1
        return "too hot" if self.rounds in self.objections else None

    def finish(self):
        return self.conditions


def test_rounds_that_do_not_count_are_kept_apart(pair):
    clock = DriftingClock({pair[0]: 10.0, pair[1]: 5.0})
    monitor = Objecting({1, 3}, Conditions())
    found = measure_together(pair, (torch.zeros(1),), clock, rounds=ROUNDS, monitor=monitor)
    assert found.counts[:4].tolist() == [False, True, False, True]
    assert len(found.rows) == len(found.samples) + 2 and np.array_equal(found.samples, found.rows[found.counts])
    assert found.noisy is None and found.discarded == f"2 of {len(found.rows)} rounds discarded (too hot)"


def test_a_widened_comparison_reaches_further_by_a_share_of_its_ends():
    known = comparison_of(np.array([[10.0, 4.0], [10.0, 5.0], [10.0, 6.0]]), "measured")
    wide = widened(known, 0.25)
    assert (wide.ratio.median, wide.ratio.high) == (known.ratio.median, 1.25 * known.ratio.high)
    assert wide.ratio.low == pytest.approx(known.ratio.low / 1.25)
    assert wide.candidate.low == pytest.approx(known.candidate.low / 1.25)
    assert wide.candidate.high == pytest.approx(1.25 * known.candidate.high)


def test_a_comparison_says_what_was_wrong_and_how_many_rounds_count(pair):
    clock = DriftingClock({pair[0]: 10.0, pair[1]: 5.0})
    monitor = Objecting({1, 3}, Conditions(("a note",), "somebody else computes"))
    found = compare(*pair, (torch.zeros(1),), clock, rounds=ROUNDS, monitor=monitor)
    assert found.noisy == "somebody else computes"
    assert found.notes == (f"2 of {found.baseline.samples + 2} rounds discarded: too hot", "a note")
    assert found.candidate.samples == found.baseline.samples >= ROUNDS.min_rounds
    assert Comparison.from_dict(json.loads(json.dumps(found.as_dict()))).as_dict() == found.as_dict()


@pytest.mark.parametrize(("source", "simulated"), [("measured", False), ("simulated", True), ("table", False)])
def test_a_comparison_says_where_it_comes_from(source, simulated, pair):
    clock = DriftingClock({pair[0]: 10.0, pair[1]: 5.0})
    clock.simulated = simulated
    if source == "table":
        clock.source = "table"
    found = compare(*pair, (torch.zeros(1),), clock, rounds=ROUNDS)
    assert (found.source, found.simulated) == (source, simulated)


def test_a_device_that_never_settles_is_waited_for_only_once(monkeypatch):
    class Wandering(Sleeper):
        def forward(self, x):
            self.calls += 1
            self.now += 1e-3 * (1 + self.calls % 5)
            return x

    clock, spent = DeviceClock(min_sample_ms=1e-6, agreement=0.0, warm_up_s=5.0), []
    model = Wandering(monkeypatch)
    for _ in range(3):
        before = model.now
        clock.prepare(model, (torch.zeros(1),))
        spent.append(model.now - before)
    assert spent[0] >= 5.0 and all(2.0 <= seconds < 3.0 for seconds in spent[1:])


class Sleeper(nn.Module):
    """Every call takes `usual` ms, and the next one `once` more, of a clock that only it advances."""

    def __init__(self, monkeypatch, usual=0.4):
        super().__init__()
        self.now, self.calls, self.usual, self.once = 0.0, 0, usual, 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def forward(self, x):
        self.now += (self.usual + self.once) * 1e-3
        self.once = 0.0
        self.calls += 1
        return x


def test_the_cpu_clock_times_short_calls_in_blocks(monkeypatch):
    model = Sleeper(monkeypatch)
    sampler = DeviceClock(min_sample_ms=2.0).prepare(model, (torch.zeros(1),))
    warm_up = model.calls
    assert sampler() == pytest.approx(0.4)
    assert model.calls - warm_up == 1 + 5  # one that is not timed, and 5 x 0.4 ms fill the block of 2 ms
    assert warm_up >= 3 * 3 * 5  # three medians of three blocks had to agree


def test_a_sample_begins_as_warm_as_steady_use_is(monkeypatch):
    """The first call of a row finds cold caches; whatever it takes is not timed, unless a call is long."""
    model = Sleeper(monkeypatch)
    sampler = DeviceClock(min_sample_ms=2.0).prepare(model, (torch.zeros(1),))
    model.once = 50.0
    assert sampler() == pytest.approx(0.4)
    slow = Sleeper(monkeypatch, usual=20.0)
    sampler = DeviceClock(min_sample_ms=2.0).prepare(slow, (torch.zeros(1),))
    calls = slow.calls
    assert sampler() == pytest.approx(20.0) and slow.calls == calls + 1


def test_the_cpu_clock_runs_without_gradients():
    seen = []
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
    DeviceClock(min_sample_ms=1e-6, warm_up_s=0.0).prepare(model, (torch.zeros(1, 2),))()
    assert seen and all(seen)


def test_measure_latency_hands_the_model_over_in_eval_mode_and_gives_its_mode_back():
    model, seen = nn.Linear(3, 2).train(), []

    class Clock:
        simulated = True

        def prepare(self, model, inputs):
            seen.append((model.training, inputs[0].shape, inputs[0].dtype, model.weight.dtype))
            return lambda: 7.0

    latency = measure_latency_ms(model, (4, 3), dtype=torch.bfloat16, clock=Clock(), rounds=Rounds())
    assert latency.median == 7.0 and latency.samples == Rounds().min_rounds
    assert seen == [(False, (4, 3), torch.bfloat16, torch.bfloat16)]
    assert model.training


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_clock_measures_on_cuda():
    model, x = nn.Linear(64, 64).cuda(), torch.randn(8, 64, device="cuda")
    sampler = DeviceClock(min_sample_ms=0.5, warm_up_s=0.2).prepare(model, (x,))
    assert all(0.0 < sampler() < 1e3 for _ in range(3))
    found = compare(model, model, (x,), DeviceClock(warm_up_s=0.2), rounds=Rounds(max_rounds=10, max_seconds=5.0))
    assert found.ratio.low <= found.ratio.median <= found.ratio.high
