"""Whether this process has its CPUs to itself while a round is timed.

A thread that waits for a CPU, a process that is stopped and a neighbour that fills the caches lengthen a long sample
more often than a short one, and so change the ratio of a small model to a large one. Linux counts all three.
"""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path

PROC = Path("/proc")
MAX_WAITED = 0.05  # share of a round that threads which could run may have waited for a CPU, summed over the threads
MAX_IDLE = 0.25  # share of its usual CPU time that a process may lack in a round
MAX_OTHERS = 0.25  # share of all CPUs that other processes and the host may use
OTHERS_EVERY_S = 0.5  # the system counts in ticks of 10 ms: over less than this the share would be a guess
SHORTEST_ROUND_S = 1e-3  # what is read takes about a tenth of this
WAITED, STOPPED, OTHERS = "threads waited for a CPU", "the process stood still", "other processes used the CPUs"


class Contention:
    """Tells after each round whether others had what this process needed.

    Args:
        proc: where the kernel's files are mounted; what is not there is not watched.
    """

    def __init__(self, proc: Path = PROC) -> None:
        self.proc = proc
        self.reset()
        self.begin()

    def reset(self) -> None:
        """Forget what was usual: other models are timed from here on."""
        self._usual: deque[float] = deque(maxlen=50)  # CPU seconds per second of the last rounds
        self._others_since = self._busy()
        self._crowded = False

    def begin(self) -> None:
        """A round begins."""
        self._start = (time.perf_counter(), time.process_time(), self._waited_s())

    def end(self) -> str | None:
        """Why the round that just ended does not count, or None."""
        wall_s, cpu_s, waited_s = (
            now - then
            for now, then in zip((time.perf_counter(), time.process_time(), self._waited_s()), self._start, strict=True)
        )
        crowded = self._others()
        if wall_s < SHORTEST_ROUND_S:
            return None
        if waited_s > MAX_WAITED * wall_s:
            return WAITED
        used = cpu_s / wall_s
        usual = sorted(self._usual)[len(self._usual) // 2] if self._usual else 0.0
        self._usual.append(used)
        if used < (1 - MAX_IDLE) * usual:
            return STOPPED
        return OTHERS if crowded else None

    def _waited_s(self) -> float:
        """Seconds that this process's threads have waited for a CPU so far; 0 where the kernel does not tell."""
        waited_ns = 0
        try:
            for task in (self.proc / "self" / "task").iterdir():
                try:
                    waited_ns += int((task / "schedstat").read_text().split()[1])
                except (FileNotFoundError, ProcessLookupError):
                    continue  # a thread that has ended meanwhile
        except (OSError, IndexError, ValueError):
            return 0.0
        return waited_ns / 1e9

    def _busy(self) -> tuple[float, float, float] | None:
        """Now, the seconds that all CPUs together were busy so far, and those of this process."""
        try:
            ticks = [int(field) for field in (self.proc / "stat").read_text().split("\n")[0].split()[1:9]]
            user, nice, system, _, _, irq, softirq, steal = ticks
        except (OSError, ValueError):
            return None
        busy_s = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy_s, time.process_time()

    def _others(self) -> bool:
        """Whether others, the host included, used too many of the CPUs when it was last counted."""
        now = self._busy()
        if now is None or self._others_since is None:
            return False
        wall_s, busy_s, own_s = (later - earlier for later, earlier in zip(now, self._others_since, strict=True))
        if wall_s >= OTHERS_EVERY_S:
            self._others_since = now
            self._crowded = busy_s - own_s > MAX_OTHERS * wall_s * (os.cpu_count() or 1)
        return self._crowded
