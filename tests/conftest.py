"""Workers share the machine: one thread and one CPU each, decided before torch is imported.

Without that, commands that pin themselves to as many CPUs as they have threads would all choose the same one.
"""

import os

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[int(worker.removeprefix("gw")) % len(cpus)]})
