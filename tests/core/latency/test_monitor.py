import os
from types import SimpleNamespace

import pytest
import torch

from hawada.core.latency import DeviceMonitor, Rounds, monitor as monitor_module
from hawada.core.latency.monitor import POWER_CAP, SLOWDOWNS
from hawada.core.latency.profiler import measure_rounds

CUDA = torch.device("cuda", 0)
ROUNDS = Rounds(precision=0.0, min_rounds=4, max_rounds=8, max_seconds=60.0)


class NVMLError(Exception):
    pass


class FakeNvml:
    """NVML that reports in round i what `reasons(i)` and `pids(i)` return."""

    NVMLError = NVMLError

    def __init__(self, reasons=lambda _: 0, pids=lambda _: [os.getpid()]):
        self.reasons, self.pids, self.round = reasons, pids, -1

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        self.round += 1
        return self.reasons(self.round)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid) for pid in self.pids(self.round)]


class Uncontended:
    """A machine on which nobody else computes, as the one that runs the tests may not be."""

    begun, resets, reason = 0, 0, None

    def reset(self):
        self.resets += 1

    def begin(self):
        self.begun += 1

    def end(self):
        return self.reason


@pytest.fixture(autouse=True)
def contention(monkeypatch):
    contention = Uncontended()
    monkeypatch.setattr(monitor_module, "Contention", lambda: contention)
    return contention


def test_a_round_that_others_disturbed_does_not_count(contention, tmp_path):
    monitor = DeviceMonitor(torch.device("cpu"), cgroups=tmp_path)
    monitor.settle(0.0)
    assert contention.begun == 1 and monitor.check() is None
    before = contention.resets
    monitor.start()
    assert contention.resets == before + 1  # what other models used is no measure for these
    contention.reason = "threads waited for a CPU"
    assert monitor.check() == "threads waited for a CPU"


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))


def measured(nvml, tmp_path, **options):
    monitor = DeviceMonitor(CUDA, nvml=nvml, cgroups=tmp_path, **options)
    return measure_rounds([lambda: 1.0, lambda: 2.0], ROUNDS, monitor=monitor)


def test_a_quiet_gpu_has_nothing_against_a_verdict(tmp_path):
    found = measured(FakeNvml(), tmp_path)
    assert found.noisy is None and len(found.samples) == 4
    assert not any("discarded" in note or "NVML" in note for note in found.notes)


@pytest.mark.parametrize(("bit", "name"), SLOWDOWNS.items(), ids=SLOWDOWNS.values())
def test_a_round_under_a_slowdown_is_replaced_and_told(bit, name, tmp_path):
    found = measured(FakeNvml(lambda i: bit if i == 1 else 0), tmp_path)
    assert found.noisy is None and len(found.samples) == 4
    assert f"1 of 5 rounds discarded: {name}" in found.notes


def test_a_gpu_that_is_slowed_down_throughout_gives_figures_that_no_verdict_rests_on(tmp_path):
    found = measured(FakeNvml(lambda _: 0x40 | POWER_CAP), tmp_path)
    assert found.noisy == "16 of 16 rounds discarded (hardware thermal slowdown)"
    assert len(found.samples) == 16


def test_discarded_rounds_are_told_and_do_not_veto_while_enough_count(tmp_path):
    found = measured(FakeNvml(lambda i: 0x08 if i % 3 else 0), tmp_path)
    assert found.noisy is None and found.broken is None and len(found.samples) == 4
    assert len(found.rows) == 10 and "6 of 10 rounds discarded: hardware slowdown" in found.notes
    few = measured(FakeNvml(lambda i: 0x08 if i % 10 else 0), tmp_path)
    assert few.noisy == "14 of 16 rounds discarded (hardware slowdown)" and len(few.samples) == 16


def test_the_power_cap_is_only_noted(tmp_path):
    found = measured(FakeNvml(lambda i: POWER_CAP if i < 2 else 0), tmp_path)
    assert found.noisy is None
    assert "the power cap held the clock down in 2 of 4 rounds" in found.notes


def test_another_process_on_the_gpu_makes_the_figure_noisy(tmp_path):
    found = measured(FakeNvml(pids=lambda i: [os.getpid(), 4242] if i == 2 else [os.getpid()]), tmp_path)
    assert found.noisy == "other processes compute on the GPU (pid 4242)"


def test_the_process_that_started_this_one_is_not_foreign(tmp_path):
    assert measured(FakeNvml(pids=lambda _: [os.getpid(), 4242]), tmp_path, own_pids=[4242]).noisy is None


@pytest.mark.parametrize(("pids", "noisy"), [([], False), ([7], False), ([7, 8], True)])
def test_in_a_container_only_more_processes_than_ours_are_foreign(pids, noisy, tmp_path):
    """NVML lists the host's process ids there, among which our own cannot be told."""
    found = measured(FakeNvml(pids=lambda _: pids), tmp_path)
    assert (found.noisy is not None) == noisy


def test_without_nvml_measuring_goes_on_and_says_what_it_cannot_see(tmp_path):
    nvml = FakeNvml()
    nvml.nvmlInit = lambda: (_ for _ in ()).throw(NVMLError("Driver Not Loaded"))
    found = measured(nvml, tmp_path)
    assert found.noisy is None and len(found.samples) == 4
    missing = "throttling and other processes went unseen: NVML is missing (Driver Not Loaded)"
    assert missing in found.notes


def refuse(_):
    raise NVMLError("Not Supported")


def test_one_question_that_nvml_does_not_answer_leaves_the_others(tmp_path):
    found = measured(FakeNvml(refuse, lambda _: [os.getpid(), 4242]), tmp_path)
    assert "throttling went unseen: NVML does not tell (Not Supported)" in found.notes
    assert found.noisy == "other processes compute on the GPU (pid 4242)"
    found = measured(FakeNvml(lambda _: 0x40, refuse), tmp_path)
    assert "other processes went unseen: NVML does not tell (Not Supported)" in found.notes
    assert found.noisy == "16 of 16 rounds discarded (hardware thermal slowdown)"


V1 = "nr_periods 9\nnr_throttled {times}\nthrottled_time {ns}\n"
V2 = "usage_usec 1\nnr_periods 9\nnr_throttled {times}\nthrottled_usec {us}\n"


@pytest.mark.parametrize(("folder", "text"), [("", V2), ("cpu", V1), ("cpu,cpuacct", V1)])
def test_what_the_cpu_quota_took_meanwhile_is_noted(folder, text, tmp_path):
    stat = tmp_path / folder / "cpu.stat"
    stat.parent.mkdir(exist_ok=True)
    stat.write_text(text.format(times=3, us=100_000, ns=100_000_000))
    monitor = DeviceMonitor(torch.device("cpu"), cgroups=tmp_path)
    assert monitor.check() is None
    assert not any("quota" in note for note in monitor.finish().notes)
    stat.write_text(text.format(times=5, us=350_000, ns=350_000_000))
    assert "the cgroup's CPU quota stopped this process 2 times for 0.25 s" in monitor.finish().notes
    monitor.start()
    assert not any("quota" in note for note in monitor.finish().notes)


def test_a_quota_that_cannot_be_read_is_noted(tmp_path):
    (tmp_path / "cpu.stat").write_text("something else entirely")
    monitor = DeviceMonitor(torch.device("cpu"), cgroups=tmp_path)
    assert monitor.check() is None
    notes = monitor.finish().notes
    assert any(note.startswith("the CPU quota went unseen: ") for note in notes)
    assert not any("stopped this process" in note for note in notes)


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="the system tells no load")
def test_the_load_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (3.25, 0.0, 0.0))
    notes = DeviceMonitor(torch.device("cpu"), cgroups=tmp_path).finish().notes
    assert any(note.startswith("load average 3.2 on ") for note in notes)
