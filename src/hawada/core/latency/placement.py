"""How near to each other a CPU's threads run.

On a virtual machine handing work from thread to thread takes now one time, now another, for seconds to a minute: most
likely the host moves virtual CPUs between cores that share a cache and cores that do not. The ratio of a small model to
a large one is then another too, while neither load nor clock shows anything. A probe of little but handing over tells
the placements apart.

What is near is what this process typically sees, not the nearest that was ever seen: that one only falls, and every
later placement would be called apart.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import torch

SAME_PLACEMENT_FACTOR = 1.2  # placements whose hand-over times differ by less than this factor are the same
ELEMENTS_PER_THREAD = 17_000  # of an operation: more than PyTorch gives to one thread, and as little as can be
OPERATIONS_PER_TRY, TRIES = 30, 3  # of a probe, about half a millisecond; the fastest try counts
NEAR_QUANTILE = 0.25  # of the recent probes: what counts as near
RECENT_PROBES = 64
KNOWN_PROBES = 16  # what an earlier process found counts as much as so many probes


class Placement:
    """Tells whether this process's threads run as near to each other as they can.

    Args:
        near_us: microseconds of the probe when they did in an earlier process; None: what is seen from now on.
    """

    def __init__(self, near_us: float | None = None) -> None:
        elements = ELEMENTS_PER_THREAD * torch.get_num_threads()
        self._source, self._target = torch.ones(elements), torch.empty(elements)
        self._recent = deque([] if near_us is None else [near_us] * KNOWN_PROBES, maxlen=RECENT_PROBES)
        self._recent.append(self.probe())

    @property
    def near_us(self) -> float:
        """Microseconds of the probe when the threads run near to each other: a low quantile of the recent probes."""
        return float(np.quantile(self._recent, NEAR_QUANTILE, method="higher"))

    @torch.inference_mode()
    def probe(self) -> float:
        """Microseconds of a small operation that all threads share."""
        tries = []
        for _ in range(TRIES):
            start = time.perf_counter()
            for _ in range(OPERATIONS_PER_TRY):
                torch.add(self._source, self._source, out=self._target)
            tries.append((time.perf_counter() - start) / OPERATIONS_PER_TRY * 1e6)
        return min(tries)

    def apart(self) -> bool:
        """Whether the threads now run further from each other than they typically do when they are near."""
        return self.probe() > SAME_PLACEMENT_FACTOR * self.near_us

    def apart_after_round(self) -> bool:
        """Likewise, and what was seen tells from now on what is typical; waiting is not."""
        now_us, near_us = self.probe(), self.near_us
        self._recent.append(now_us)
        return now_us > SAME_PLACEMENT_FACTOR * near_us

    def wait(self, limit_s: float) -> bool:
        """Wait until they are near again, at most so long; returns whether they are."""
        start = time.perf_counter()
        while self.apart():
            if time.perf_counter() - start >= limit_s:
                return False
            time.sleep(0.02)
        return True
