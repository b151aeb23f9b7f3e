import time

import pytest
import torch

from hawada.core.latency import DeviceMonitor, Rounds, monitor as monitor_module
from hawada.core.latency.placement import (
    KNOWN_PROBES,
    OPERATIONS_PER_TRY,
    RECENT_PROBES,
    SAME_PLACEMENT_FACTOR,
    Placement,
)
from hawada.core.latency.profiler import measure_rounds

NEAR, FAR = 3.0, 3.0 * SAME_PLACEMENT_FACTOR + 0.5
ROUNDS = Rounds(precision=0.0, min_rounds=4, max_rounds=4, max_seconds=60.0, patience_s=5.0)


@pytest.fixture
def handovers(monkeypatch):
    """What the probe finds, one reading after the other; the last one stays."""
    readings = [NEAR]

    def probe(self):
        return readings.pop(0) if len(readings) > 1 else readings[0]

    monkeypatch.setattr(Placement, "probe", probe)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(monitor_module, "Contention", Uncontended)
    return readings


class Uncontended:
    """A machine on which nobody else computes, as the one that runs the tests may not be."""

    def reset(self):
        pass

    def begin(self):
        pass

    def end(self):
        return None


def measured(monitor, rounds=ROUNDS):
    return measure_rounds([lambda: 1.0, lambda: 2.0], rounds, monitor=monitor)


def test_a_probe_is_the_fastest_try(monkeypatch):
    """Tries of 30 operations take so many microseconds an operation; the clock is read before and after each."""
    tries = [9.0, 5.0, 7.0, 6.0, 8.0, 8.0, 4.0, 9.0, 9.0]
    readings = [edge for us in tries for edge in (0.0, us * OPERATIONS_PER_TRY * 1e-6)]
    monkeypatch.setattr(time, "perf_counter", lambda: readings.pop(0))
    placement = Placement()
    assert placement.near_us == pytest.approx(5.0)
    assert placement.probe() == pytest.approx(6.0) and placement.probe() == pytest.approx(4.0)


def test_one_probe_that_was_nearer_than_all_others_calls_nothing_apart(handovers):
    """On an idle virtual machine the nearest ever lies 1.2 times below most: then most rounds were called apart."""
    placement = Placement()
    handovers[:] = [NEAR / 2, *[NEAR] * 7, *[1.1 * NEAR, NEAR] * 20]
    assert [placement.apart_after_round() for _ in range(40)].count(True) == 0
    assert placement.near_us == pytest.approx(NEAR)


def test_what_stays_becomes_typical_and_waiting_teaches_nothing(handovers):
    placement = Placement(NEAR)
    handovers[:] = [FAR]
    for _ in range(RECENT_PROBES):
        assert placement.apart()
    found = [placement.apart_after_round() for _ in range(RECENT_PROBES)]
    assert all(found[:KNOWN_PROBES]) and not found[-1]


def test_a_probe_really_takes_time():
    assert 0 < Placement().near_us < 1e5


def test_a_round_after_which_the_threads_run_apart_is_replaced(handovers, tmp_path):
    monitor = DeviceMonitor(torch.device("cpu"), cgroups=tmp_path)
    handovers[:] = [NEAR, NEAR, NEAR, FAR, NEAR]  # before and after each round
    found = measured(monitor)
    assert found.noisy is None and len(found.samples) == 4
    assert "1 of 5 rounds discarded: the threads ran apart" in found.notes


def test_measuring_waits_until_they_are_near_again(handovers, tmp_path):
    monitor = DeviceMonitor(torch.device("cpu"), cgroups=tmp_path)
    handovers[:] = [FAR, FAR, FAR, NEAR]
    found = measured(monitor)
    assert found.noisy is None and len(found.samples) == 4 and not any("apart" in note for note in found.notes)


def test_when_patience_ends_rounds_count_and_the_record_says_so(handovers, tmp_path):
    monitor = DeviceMonitor(torch.device("cpu"), handover_us=NEAR, cgroups=tmp_path)
    handovers[:] = [FAR]
    found = measured(monitor, Rounds(precision=0.0, min_rounds=4, max_rounds=4, patience_s=0.0))
    assert found.noisy is None and len(found.samples) == 4
    assert "the threads ran apart in 4 of 4 rounds" in found.notes


def test_what_was_near_before_is_known_to_a_new_process(handovers, tmp_path):
    handovers[:] = [FAR]
    assert DeviceMonitor(torch.device("cpu"), handover_us=NEAR, cgroups=tmp_path).placement.apart()
    assert not DeviceMonitor(torch.device("cpu"), cgroups=tmp_path).placement.apart()


@pytest.mark.parametrize(("device", "threads"), [("cpu", 1), ("mps", 4)])
def test_there_is_nothing_to_watch_with_one_thread_or_elsewhere(device, threads, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monitor = DeviceMonitor(torch.device(device), cgroups=tmp_path)
    assert monitor.handover_us is None and monitor.settle(10.0) == 0.0 and monitor.check() is None
