import os
import time

import pytest

from hawada.core.latency.contention import MAX_OTHERS, OTHERS, STOPPED, WAITED, Contention


class Machine:
    """A kernel whose files and clocks say what they are told."""

    def __init__(self, proc, monkeypatch):
        self.proc, self.now, self.cpu, self.waited, self.others = proc, 0.0, 0.0, [0.0, 0.0], 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "process_time", lambda: self.cpu)
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        self.write()

    def write(self):
        for thread, seconds in enumerate(self.waited):
            task = self.proc / "self" / "task" / str(thread)
            task.mkdir(parents=True, exist_ok=True)
            (task / "schedstat").write_text(f"1 {int(seconds * 1e9)} 3\n")
        ticks = int((self.cpu + self.others) * os.sysconf("SC_CLK_TCK"))
        (self.proc / "stat").write_text(f"cpu  {ticks} 0 0 77 88 0 0 0 0 0\ncpu0 1 2 3\n")

    def round(self, contention, wall=0.1, *, cpus=2.0, waited=0.0, others=0.0):
        """What `end` returns for a round in which two threads used `cpus` CPUs, one waited, and others used theirs."""
        contention.begin()
        self.now += wall
        self.cpu += cpus * wall
        self.waited[1] += waited
        self.others += others * wall
        self.write()
        return contention.end()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def test_a_quiet_machine_objects_to_nothing(machine):
    contention = Contention(machine.proc)
    assert [machine.round(contention, waited=0.004, others=0.2) for _ in range(30)] == [None] * 30


def test_a_round_in_which_a_thread_waited_for_a_cpu_does_not_count(machine):
    contention = Contention(machine.proc)
    found = [machine.round(contention, waited=seconds) for seconds in (0.0, 0.006, 0.0, 0.5, 0.0)]
    assert found == [None, WAITED, None, WAITED, None]


def test_a_round_in_which_the_process_was_stopped_does_not_count(machine):
    contention = Contention(machine.proc)
    assert [machine.round(contention) for _ in range(3)] == [None] * 3
    assert machine.round(contention, cpus=1.4) == STOPPED
    assert machine.round(contention) is None


def test_what_was_usual_is_forgotten_when_other_models_are_timed(machine):
    contention = Contention(machine.proc)
    assert [machine.round(contention) for _ in range(3)] == [None] * 3
    contention.reset()
    assert machine.round(contention, cpus=1.0) is None


def test_a_process_that_never_uses_its_cpus_is_not_stopped(machine):
    contention = Contention(machine.proc)
    assert [machine.round(contention, cpus=0.3) for _ in range(30)] == [None] * 30


def test_rounds_beside_processes_that_use_other_cpus_do_not_count(machine):
    contention = Contention(machine.proc)
    assert machine.round(contention, 1.0) is None
    crowd = 2 * MAX_OTHERS + 0.1
    found = [machine.round(contention, 0.1, others=crowd) for _ in range(10)]
    assert found[:4] == [None] * 4 and found[-5:] == [OTHERS] * 5  # told once half a second has been counted
    assert machine.round(contention, 1.0) is None


def test_where_the_kernel_tells_nothing_nothing_is_watched(tmp_path, machine):
    contention = Contention(tmp_path / "nowhere")
    assert [machine.round(contention, waited=1.0, others=2.0) for _ in range(20)] == [None] * 20


@pytest.mark.parametrize("broken", ["cpu 1 2\n", "something else\n", ""])
def test_files_that_say_something_else_are_ignored(broken, machine):
    (machine.proc / "stat").write_text(broken)
    contention = Contention(machine.proc)
    (machine.proc / "stat").write_text(broken)
    assert contention.end() is None


def test_the_real_kernel_is_read_in_little_time():
    contention = Contention()
    start = time.perf_counter()
    for _ in range(10):
        contention.begin()
        contention.end()
    assert time.perf_counter() - start < 1.0
