"""Workers share the machine: one thread and one CPU each, decided before torch is imported.

Without that, commands that pin themselves to as many CPUs as they have threads would all choose the same one.
"""

import functools
import gc
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[int(worker.removeprefix("gw")) % len(cpus)]})

import torch  # only now: it reads the environment

torch.set_warn_always(True)  # it warns once a process, so that the order of tests would decide which of them fails


def pytest_collection_finish():
    """What was imported stays; the garbage collector need not look through all of it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def configuration_files_are_parsed_once():
    """Composing reads the same files every time, and PyYAML is slow; a file that was changed is read again."""
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    Plugins.instance()  # registers the sources
    sources = SourcesRegistry.instance().types

    def remember(source, state):
        original, parsed = source.load_config, {}

        def load_config(self, config_path):
            key = (self.provider, self.path, config_path, state(self, config_path))
            if key not in parsed:
                parsed[key] = pickle.dumps(original(self, config_path))
            return pickle.loads(parsed[key])  # a copy, as callers write into it

        return mock.patch.object(source, "load_config", load_config)

    def state_of_file(self, config_path):
        path = os.path.join(self.path, self._normalize_file_name(config_path))
        found = os.stat(path) if os.path.exists(path) else None
        return found and (os.path.realpath(path), found.st_ino, found.st_size, found.st_mtime_ns)

    with (
        remember(sources["file"], state_of_file),
        remember(sources["pkg"], lambda *_: None),  # Hydra's own, which nobody changes
    ):
        yield


@pytest.fixture(scope="session", autouse=True)
def interpolations_are_parsed_once():
    """OmegaConf parses `${...}` anew each time that a value is read; nothing changes the trees that it gets."""
    from omegaconf import base, grammar_parser

    parse = functools.cache(grammar_parser.parse)
    with mock.patch.object(grammar_parser, "parse", parse), mock.patch.object(base, "parse", parse):
        yield


@pytest.fixture
def no_reload():
    """Leaves out the fresh process that takes seconds for every model, where a test is about something else."""
    from hawada.experiment.results import Reload

    proof = Reload(max_abs_diff=0.0, max_abs_logit=1.0, stock=False)
    with mock.patch("hawada.stages.evaluate.prove_reload", lambda *_: proof):
        yield


@pytest.fixture
def reload_here():
    """Reloads a model in this process by the program of the fresh one, whose imports take seconds."""

    def run(command, **_):
        assert command[1] == "-c"
        threads, package = torch.get_num_threads(), sys.modules["hawada"]
        try:
            with mock.patch.object(sys, "argv", command[1:2] + command[3:]):
                exec(command[2], {})
        finally:
            sys.modules["hawada"] = package  # the program of a stock format takes it away
            torch.set_num_threads(threads)
        return subprocess.CompletedProcess(command, 0, "", "")

    with mock.patch("hawada.stages.evaluate.subprocess", SimpleNamespace(run=run)):
        yield
