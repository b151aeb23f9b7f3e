"""Watches the device while it is timed: throttling, other processes, load, where a CPU's threads run."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch

from hawada.core.latency.contention import Contention
from hawada.core.latency.placement import Placement

Answer = TypeVar("Answer")
CGROUPS = Path("/sys/fs/cgroup")

# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h), worst first: rounds under these do not count.
SLOWDOWNS = {
    0x40: "hardware thermal slowdown",
    0x80: "power-brake slowdown",
    0x20: "software thermal slowdown",
    0x08: "hardware slowdown",
}
POWER_CAP = 0x04


@dataclass(frozen=True)
class Conditions:
    """What was seen while something was timed.

    Attributes:
        notes: for the record.
        noisy: why no verdict may rest on the figures, or None.
    """

    notes: tuple[str, ...] = ()
    noisy: str | None = None


class Monitor(Protocol):
    """Watches a device from `start` to `finish`."""

    def start(self) -> None:
        """Begin anew."""
        ...

    def settle(self, limit_s: float) -> float:
        """Called before every round: wait until the device is as it should be; returns seconds waited.

        Args:
            limit_s: the longest wait; once it is 0 or used up, rounds count however the device is.
        """
        ...

    def check(self) -> str | None:
        """Called after every round: why it does not count, or None."""
        ...

    def finish(self) -> Conditions:
        """What was seen since `start`."""
        ...


class DeviceMonitor:
    """NVML between rounds on a GPU, on a CPU who else uses it and where threads run; everywhere load and the quota.

    Args:
        device: what is timed.
        own_pids: processes besides this one that may use the GPU without being foreign.
        handover_us: of a CPU's threads when they ran near to each other, see `placement`; None: what is
            seen from now on.
        nvml: the NVML binding; None imports pynvml.
        cgroups: where control groups are mounted.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        own_pids: Iterable[int] = (),
        handover_us: float | None = None,
        nvml: ModuleType | Any | None = None,
        cgroups: Path = CGROUPS,
    ) -> None:
        self.device, self.cgroups = device, cgroups
        self.own = {os.getpid(), *own_pids}
        self._nvml: Any = None
        self._unseen: dict[str, str] = {}  # what NVML does not tell, and why
        self.placement: Placement | None = None
        self.contention = Contention() if device.type == "cpu" else None
        if device.type == "cuda":
            self._open(nvml)
        elif device.type == "cpu" and torch.get_num_threads() > 1:
            self.placement = Placement(handover_us)
        self.start()

    @property
    def handover_us(self) -> float | None:
        """Of the threads of a CPU when they run near to each other; None where that is not watched."""
        return None if self.placement is None else self.placement.near_us

    def start(self) -> None:
        """Begin anew."""
        if self.contention is not None:
            self.contention.reset()
        self._capped = self._rounds = self._apart = 0
        self._impatient = False
        self._foreign: set[int] = set()
        self._throttled = self._throttling()

    def settle(self, limit_s: float) -> float:
        """Wait until a CPU's threads run as near to each other as they can; returns seconds waited."""
        waited_s = 0.0
        if self.placement is not None and not self._impatient:
            start = time.perf_counter()
            self._impatient = not self.placement.wait(limit_s)
            waited_s = time.perf_counter() - start
        if self.contention is not None:
            self.contention.begin()
        return waited_s

    def check(self) -> str | None:
        """Why the round that just ended does not count, or None."""
        self._rounds += 1
        contended = None if self.contention is None else self.contention.end()
        if contended is not None:
            return contended
        if self.placement is not None and self.placement.apart_after_round():
            self._apart += self._impatient
            return None if self._impatient else "the threads ran apart"
        if self._nvml is None:
            return None
        reasons = self._ask("throttling", self._clock_reasons, 0)
        self._capped += bool(reasons & POWER_CAP)
        self._foreign |= self._others(self._ask("other processes", self._processes, set()))
        return next((name for bit, name in SLOWDOWNS.items() if reasons & bit), None)

    def finish(self) -> Conditions:
        """What was seen since `start`."""
        (times, seconds), (times_before, seconds_before) = self._throttling(), self._throttled
        notes = [f"{what} went unseen: {why}" for what, why in self._unseen.items()]
        if self._capped:
            notes.append(f"the power cap held the clock down in {self._capped} of {self._rounds} rounds")
        if self._apart:
            notes.append(f"the threads ran apart in {self._apart} of {self._rounds} rounds")
        if hasattr(os, "getloadavg"):
            notes.append(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
        if times > times_before:
            stops, lost_s = times - times_before, seconds - seconds_before
            notes.append(f"the cgroup's CPU quota stopped this process {stops} times for {lost_s:.2f} s")
        noisy = None
        if self._foreign:
            noisy = f"other processes compute on the GPU (pid {', '.join(map(str, sorted(self._foreign)))})"
        return Conditions(tuple(notes), noisy)

    def _throttling(self) -> tuple[int, float]:
        """What the CPU quota did so far; what cannot be read is noted, as measuring goes on without it."""
        try:
            return _cgroup_throttling(self.cgroups)
        except (OSError, ValueError) as error:
            self._unseen["the CPU quota"] = str(error)
            return 0, 0.0

    def _open(self, nvml: Any) -> None:
        try:
            nvml = nvml or importlib.import_module("pynvml")
        except ImportError as error:
            self._unseen["throttling and other processes"] = f"NVML is missing ({error})"
            return
        try:
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(self.device).uuid}")
        except nvml.NVMLError as error:
            self._unseen["throttling and other processes"] = f"NVML is missing ({error})"
            return
        self._nvml = nvml

    def _ask(self, what: str, question: Callable[[], Answer], otherwise: Answer) -> Answer:
        """Return what NVML reports. An unsupported query gives `otherwise` and is not made again."""
        if what in self._unseen:
            return otherwise
        try:
            return question()
        except self._nvml.NVMLError as error:
            self._unseen[what] = f"NVML does not tell ({error})"
            return otherwise

    def _clock_reasons(self) -> int:
        ask = getattr(self._nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        return int((ask or self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(self._handle))

    def _processes(self) -> set[int]:
        return {int(process.pid) for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}

    def _others(self, pids: set[int]) -> set[int]:
        """Processes that are not ours.

        In a container NVML may list the host's process ids, among which ours cannot be told; then only more of them
        than we have can be foreign.
        """
        if self.own & pids:
            return pids - self.own
        return pids if len(pids) > len(self.own) else set()


def _cgroup_throttling(root: Path) -> tuple[int, float]:
    """How often and for how many seconds the CPU quota has stopped this process's cgroup; zeros without a quota."""
    for path in filter(Path.is_file, _cpu_stat_files(root)):
        pairs = dict(line.split() for line in path.read_text().splitlines())
        if "nr_throttled" in pairs:
            microseconds = float(pairs.get("throttled_usec", float(pairs.get("throttled_time", 0)) / 1e3))  # v1: ns
            return int(pairs["nr_throttled"]), microseconds / 1e6
    return 0, 0.0


def _cpu_stat_files(root: Path) -> list[Path]:
    """Where cgroup v2 and v1 keep it: below this process's own group, or in a container at the root."""
    groups, own = [("", "")], Path("/proc/self/cgroup")
    for line in own.read_text().splitlines() if own.is_file() else ():  # Linux alone has control groups
        _, controllers, group = line.split(":", 2)
        groups.insert(0, (controllers, group.lstrip("/")))
    folders = [root / controllers / group for controllers, group in groups if controllers in ("", "cpu", "cpu,cpuacct")]
    return [folder / "cpu.stat" for folder in (*folders, root / "cpu", root / "cpu,cpuacct")]
