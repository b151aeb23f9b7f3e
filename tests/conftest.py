"""Workers share the machine: one thread and one CPU each, decided before torch is imported.

Without that, commands that pin themselves to as many CPUs as they have threads would all choose the same one.
"""

import os
from unittest import mock

import pytest

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[int(worker.removeprefix("gw")) % len(cpus)]})

import torch  # only now: it reads the environment

torch.set_warn_always(True)  # it warns once a process, so that the order of tests would decide which of them fails


@pytest.fixture
def no_reload():
    """Leaves out the fresh process that takes seconds for every model, where a test is about something else."""
    proof = {"max_abs_diff": 0.0, "max_abs_logit": 1.0}
    with mock.patch("hawada.stages.evaluate.prove_reload", lambda *_: proof):
        yield
