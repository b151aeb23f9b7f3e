import itertools

import numpy as np
import pytest
import torch
from torch import nn

from hawada.core.latency import (
    Peaks,
    Rounds,
    SimulatedClock,
    capture_arguments,
    extreme_keep,
    find_bottleneck,
    half_keep,
    list_operators,
    measure_peaks,
    measure_staircase,
    removed_fraction,
    sensible_ratios,
    stair_axes,
)
from hawada.core.latency.diagnosis.staircase import coarse_first, fine_widths, stair_ends
from hawada.core.latency.operators import Operator
from hawada.core.structure import ExportPolicy, Group, Rounding, Site, widths_of

CPU = torch.device("cpu")
ONCE = Rounds(min_rounds=1, max_rounds=1)
X = (torch.zeros(8, 16, 12, 12),)
NET = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1)).eval()
BALANCED = {"tflops": 1.0, "gbps": 100.0, "launch_us": 5.0}


def peaks_of(clock, dtype=torch.float32):
    return measure_peaks(clock, CPU, dtype)


def bottleneck_on(clock, model=NET, inputs=X):
    return find_bottleneck(list_operators(model, inputs), peaks_of(clock), clock.prepare(model, inputs)())


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ({"tflops": 1000.0, "gbps": 1e5, "launch_us": 500.0}, "launch"),
        ({"tflops": 1000.0, "gbps": 0.5, "launch_us": 1.0}, "memory"),
        ({"tflops": 1e-3, "gbps": 1e4, "launch_us": 1.0}, "compute"),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("tile", [1, 8])
def test_each_kind_of_device_is_recognised(device, kind, noise, tile):
    found = bottleneck_on(SimulatedClock(**device, noise=noise, tile=tile))
    assert found.kind == kind
    assert found.shares[kind] == pytest.approx(1.0, abs=0.15)
    assert sum(found.shares.values()) < 1.3


def test_the_batch_takes_a_model_from_launch_bound_to_compute_bound():
    clock = SimulatedClock(tflops=1.0, gbps=1e4, launch_us=20.0)
    kinds = [bottleneck_on(clock, inputs=(torch.zeros(batch, 16, 12, 12),)).kind for batch in (1, 256)]
    assert kinds == ["launch", "compute"]


def test_peaks_are_those_that_the_device_was_made_with():
    peaks = peaks_of(SimulatedClock(tflops=3.0, gbps=70.0, launch_us=11.0))
    assert peaks.launch_ms == pytest.approx(0.011, rel=0.01)
    assert peaks.flops_per_ms / 1e9 == pytest.approx(3.0, rel=0.02)
    assert [size / ms / 1e6 for size, ms in peaks.transfers] == pytest.approx([70.0] * len(peaks.transfers), rel=0.02)


@pytest.mark.parametrize(
    "odd",
    [
        {"tflops": 1e9, "gbps": 1e9, "launch_us": 1000.0},  # everything is lost in the launch
        {"tflops": 1e9, "gbps": 1e-3, "launch_us": 0.0},
        {"tflops": 1e-6, "gbps": 1e9, "launch_us": 0.0},
        {"tflops": 1.0, "gbps": 1.0, "launch_us": 1.0, "noise": 0.5},
    ],
)
def test_odd_devices_give_finite_positive_peaks(odd):
    peaks = peaks_of(SimulatedClock(**odd))
    numbers = [peaks.launch_ms, peaks.flops_per_ms, *(ms for _, ms in peaks.transfers)]
    assert np.isfinite(numbers).all() and min(numbers) > 0
    assert peaks.transfers


class Broken(SimulatedClock):
    def prepare(self, model, inputs):
        return lambda: float("nan")


def test_a_clock_that_returns_nan_does_not_break_the_diagnosis():
    found = find_bottleneck(list_operators(NET, X), peaks_of(Broken()), 0.0)
    assert all(np.isfinite(share) for share in found.shares.values())


def test_infinite_bounds_do_not_count():
    peaks = Peaks(float("inf"), ((1000, 1.0),), 10.0)
    assert find_bottleneck([Operator(100, 10)], peaks, 1.0).kind == "compute"


def test_small_transfers_go_at_the_bandwidth_of_small_transfers():
    peaks = Peaks(0.0, ((1000, 1.0), (100000, 1000.0)), 1.0)  # 1000 bytes a ms from a cache, 100 beyond it
    assert peaks.transfer_ms(10) == pytest.approx(0.01)
    assert peaks.transfer_ms(1000) == pytest.approx(1.0)
    assert peaks.transfer_ms(10**6) == pytest.approx(10**4)
    times = [peaks.transfer_ms(10**power) for power in range(9)]
    assert times == sorted(times) and peaks.transfer_ms(0) == 0


def test_what_cannot_be_is_noticed_and_mended_by_better_peaks():
    slow, quick = Peaks(1.0, ((1000, 1.0),), 10.0), Peaks(2.0, ((1000, 0.5), (9000, 9.0)), 100.0)
    operators = [Operator(1000, 1)]
    assert find_bottleneck(operators, slow, 20.0).impossible
    best = slow.best_of(quick)
    assert best == quick.best_of(slow) == Peaks(1.0, ((1000, 0.5), (9000, 9.0)), 100.0)
    assert not find_bottleneck(operators, best, 20.0).impossible


class Stalling(SimulatedClock):
    """A device that is busy with something else whenever a small tensor is moved."""

    def prepare(self, model, inputs):
        sampler = super().prepare(model, inputs)
        stalls = 50.0 if inputs[0].dim() == 1 and 1 < inputs[0].numel() < 2**22 else 1.0
        return lambda: stalls * sampler()


def test_small_transfers_are_never_slower_than_large_ones():
    quiet, busy = (peaks_of(clock(gbps=10.0, launch_us=0.1)) for clock in (SimulatedClock, Stalling))
    assert [ms for _, ms in busy.transfers] == pytest.approx([ms for _, ms in quiet.transfers], rel=0.05)


def test_extremes_shrink_only_what_they_are_asked_to(groups):
    policy = ExportPolicy(minimum={"channel": 2})

    def widths(**chosen):
        return widths_of(extreme_keep(groups, policy, **chosen), groups)

    names = ("first.branch", "first.hidden", "second.branch", "second.hidden")
    assert tuple(widths(width=True, depth=False)[name] for name in names) == (1, 2, 1, 2)
    assert tuple(widths(width=False, depth=True)[name] for name in names) == (0, 0, 0, 0)
    staying = extreme_keep(groups, ExportPolicy(minimum={"branch": 1}), width=False, depth=True)
    assert sorted(widths_of(staying, groups).values()) == [0, 0, 1, 8]


def test_half_keeps_half_and_does_not_halve_units_inside_units_again(layers):
    keep = half_keep(layers, ExportPolicy())
    widths = widths_of(keep, layers)
    for index in range(4):
        kinds = ("", ".kv", ".query", ".ffn")
        assert [widths[f"layers.{index}{kind}"] for kind in kinds] == [1, 2, 2, 4]
    assert removed_fraction(keep, layers) == 0.5


def test_half_is_rounded_as_allowed(groups):
    widths = widths_of(half_keep(groups, ExportPolicy(rounding={"channel": Rounding(3)})), groups)
    assert widths["first.hidden"] == 3 and widths["first.branch"] == 1


def test_a_staircase_runs_along_the_widest_group_inside_the_site_once_for_each_kind(groups, sites):
    outside = Group("stream", "stream", 64, (), cuts=groups[1].cuts + groups[3].cuts)
    reading = Site("head", ("stream",), "head", reads="stream")
    touched = [Site(site.module, (*site.groups, "stream"), site.kind) for site in sites]
    axes = stair_axes([*touched, reading], [*groups, outside])
    assert [(site.module, group.name) for site, group in axes] == [("first", "first.hidden")]


def test_fine_widths_see_both_sides_of_a_step():
    assert fine_widths(8, 32) == tuple(range(1, 9))
    widths = fine_widths(512, 32)
    assert len(widths) <= 33 and widths[-1] == 512 and {32, 33, 256, 257} <= set(widths)
    for units, points in itertools.product((9, 100, 384, 1000, 4097), (8, 16, 33)):
        assert fine_widths(units, points)[-1] == units and len(fine_widths(units, points)) <= max(points + 1, 9)


def test_coarse_widths_come_first_and_all_come_once():
    widths = (1, 2, 5, 9, 10, 20, 21)
    order = coarse_first(widths)
    assert order[:5] == [21, 1, 2, 9, 10] and sorted(order) == list(widths)
    assert coarse_first((4,)) == [4]


def steps(widths, tile):
    return [float(-(-width // tile)) for width in widths]


def test_ends_of_stairs_are_the_widths_that_fill_their_tiles():
    widths = range(1, 33)
    assert stair_ends(widths, steps(widths, 8), [0.0] * 32) == (8, 16, 24)
    pairs = fine_widths(512, 32)
    assert stair_ends(pairs, steps(pairs, 64), [0.0] * len(pairs)) == tuple(range(64, 512, 64))


def test_a_step_between_widths_that_were_not_measured_is_not_given_to_one_of_them():
    assert stair_ends((8, 9, 16, 17), (1.0, 1.0, 2.0, 2.0), [0.0] * 4) == ()


def test_a_single_slow_width_is_no_stair():
    assert stair_ends(range(1, 9), (1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0), [0.0] * 8) == ()


@pytest.mark.parametrize("ms", [[1.0 + w for w in range(32)], [5.0] * 32, [32.0 - w for w in range(32)]])
def test_slopes_and_flats_have_no_stairs(ms):
    assert stair_ends(range(1, 33), ms, [0.0] * 32) == ()


def test_noise_makes_no_stairs():
    random = np.random.default_rng(0)
    ms = 10.0 + 0.5 * random.standard_normal(32)
    assert stair_ends(range(1, 33), list(ms), [0.2] * 32) == ()
    widths = range(1, 33)
    assert stair_ends(widths, steps(widths, 8), [0.5] * 32) == ()  # the same steps, seen too unsharply


def toy_staircase(toy, groups, sites, inputs, clock, **options):
    axis = stair_axes(sites, groups)[0]
    arguments = capture_arguments(toy, ["first"], toy, (inputs,))["first"]
    return measure_staircase(toy, groups, axis, arguments, clock, **({"points": 32, "rounds": ONCE} | options))


def test_a_simulated_site_shows_the_device_tile(toy, groups, sites, inputs):
    clock = SimulatedClock(tflops=1e-6, gbps=1e6, launch_us=0.0, tile=2)
    stair = toy_staircase(toy, groups, sites, inputs, clock)
    assert stair.widths == tuple(range(1, 9)) and stair.ends == (2, 4, 6)
    assert list(stair.ms) == sorted(stair.ms) and (stair.group, stair.unit) == ("first.hidden", "channel")


class Slow(SimulatedClock):
    """A clock that is not simulated, and whose warm-up uses up any budget."""

    simulated = False


def test_where_preparing_takes_too_long_fewer_widths_are_measured(toy, groups, sites, inputs, monkeypatch):
    monkeypatch.setattr("hawada.core.latency.diagnosis.staircase.MIN_WIDTHS", 3)
    rounds = Rounds(min_rounds=1, max_rounds=1, max_seconds=1e-9)
    assert toy_staircase(toy, groups, sites, inputs, Slow(), rounds=rounds).widths == (1, 2, 8)


def test_a_target_lies_between_the_fastest_and_half():
    assert sensible_ratios(0.2, 0.6) == (0.2, 0.6)
    assert sensible_ratios(0.3, 1.2) == (0.3, 1.0)
    assert sensible_ratios(0.6, 0.6) is None and sensible_ratios(0.99, 1.0) is None
    assert sensible_ratios(0.0, 0.0) is None
