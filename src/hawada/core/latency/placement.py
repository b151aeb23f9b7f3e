"""How near to each other a CPU's threads run.

On a virtual machine handing work from thread to thread takes now one time, now another, for seconds to a minute: most
likely the host moves virtual CPUs between cores that share a cache and cores that do not. The ratio of a small model to
a large one is then another too, while neither load nor clock shows anything. A probe of little but handing over tells
the placements apart.
"""

from __future__ import annotations

import math
import time

import torch

ALIKE = 1.2  # placements whose hand-over times differ by less than this factor are the same
ELEMENTS = (
    17_000  # of an operation, for each thread: more than PyTorch gives to one alone, and as little work as can be
)
OPERATIONS, TRIES = 30, 3  # of a probe, about half a millisecond; the fastest try counts


class Placement:
    """Tells whether this process's threads run as near to each other as they can.

    Args:
        nearest_us: microseconds of the probe when they did; it falls when they come nearer.
    """

    def __init__(self, nearest_us: float = math.inf) -> None:
        elements = ELEMENTS * torch.get_num_threads()
        self._source, self._target = torch.ones(elements), torch.empty(elements)
        self.nearest_us = nearest_us
        self.probe()

    @torch.inference_mode()
    def probe(self) -> float:
        """Microseconds of a small operation that all threads share."""
        tries = []
        for _ in range(TRIES):
            start = time.perf_counter()
            for _ in range(OPERATIONS):
                torch.add(self._source, self._source, out=self._target)
            tries.append((time.perf_counter() - start) / OPERATIONS * 1e6)
        self.nearest_us = min(self.nearest_us, *tries)
        return min(tries)

    def apart(self) -> bool:
        """Whether the threads now run further from each other than they once did."""
        return self.probe() > ALIKE * self.nearest_us

    def wait(self, limit_s: float) -> bool:
        """Wait until they are near again, at most so long; returns whether they are."""
        start = time.perf_counter()
        while self.apart():
            if time.perf_counter() - start >= limit_s:
                return False
            time.sleep(0.02)
        return True
