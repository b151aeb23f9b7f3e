import copy

import pytest
import torch
from torch import nn

from hawada.core.latency import Rounds, SimulatedClock, compare, measure_latency_ms

X = (torch.zeros(8, 16, 12, 12),)


def conv(channels):
    return nn.Conv2d(16, channels, 3, padding=1, bias=False)


def time_of(model, inputs=X, **options):
    return SimulatedClock(**options).prepare(model, inputs)()


def test_it_is_deterministic():
    sampler = SimulatedClock().prepare(conv(24), X)
    assert len({sampler() for _ in range(5)} | {time_of(conv(24))}) == 1


def test_compute_bound_time_by_hand():
    # 2 x 8 x 24 x 16 x 9 x 144 operations at 1e12 per second, and one launch of 5 us
    expected = 2 * 8 * 24 * 16 * 9 * 144 / 1e9 + 0.005
    assert time_of(conv(24), tflops=1.0, gbps=1e6, launch_us=5.0) == pytest.approx(expected)


def test_memory_bound_time_by_hand():
    # input, weight and output are moved once each, four bytes an element, at 1e9 bytes per second
    moved = 4 * (X[0].numel() + 24 * 16 * 9 + 8 * 24 * 144)
    assert time_of(conv(24), tflops=1e6, gbps=1.0, launch_us=0.0) == pytest.approx(moved / 1e6)


def test_views_cost_nothing_and_every_other_operator_a_launch():
    flat = nn.Flatten()
    assert time_of(flat) == 0.0
    assert time_of(nn.Sequential(nn.ReLU(), flat, nn.ReLU()), gbps=1e9, launch_us=100.0) == pytest.approx(0.2, rel=1e-3)


def test_there_are_stairs():
    compute_bound = {"tflops": 1e-3, "gbps": 1e6, "tile": 8}
    times = [time_of(conv(channels), **compute_bound) for channels in range(1, 25)]
    assert len({round(ms, 9) for ms in times}) == 3
    assert times[0] == pytest.approx(times[7]) and times[8] > 1.9 * times[7]


def test_a_wider_module_is_never_cheaper():
    times = [time_of(conv(channels)) for channels in range(1, 40)]
    assert times == sorted(times) and times[-1] > times[0]


def test_noise_is_seeded_and_relative():
    def samples(seed, noise=0.1):
        sampler = SimulatedClock(noise=noise, seed=seed).prepare(conv(24), X)
        return [sampler() for _ in range(400)]

    assert samples(1) == samples(1) != samples(2)
    ratios = torch.tensor(samples(1)) / time_of(conv(24))
    assert float(ratios.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(ratios.std()) == pytest.approx(0.1, abs=0.02)
    assert min(samples(3, noise=5.0)) > 0.0


def test_the_model_is_neither_run_nor_changed():
    model = nn.Sequential(conv(8), nn.BatchNorm2d(8))
    before = copy.deepcopy(model.state_dict())
    time_of(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert next(model.parameters()).device.type == "cpu"


def test_it_plugs_into_the_profiler():
    found = compare(conv(32), conv(16), X, SimulatedClock(launch_us=0.0), rounds=Rounds())
    assert found.simulated and found.ratio.low == found.ratio.median == found.ratio.high
    assert found.ratio.median == pytest.approx(time_of(conv(16), launch_us=0.0) / time_of(conv(32), launch_us=0.0))
    assert measure_latency_ms(conv(32), X[0].shape, clock=SimulatedClock()).median == time_of(conv(32))
