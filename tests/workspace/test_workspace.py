"""How long a stage measures, and what its figures are called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from hawada.config import conf_dir, register_resolvers
from hawada.core.latency import Rounds
from hawada.experiment import PLANS, Run
from hawada.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Any:
    """A function from overrides to the workspace of stage=evaluate."""
    threads = torch.get_num_threads()

    def make(*overrides: str) -> Workspace:
        GlobalHydra.instance().clear()
        register_resolvers()
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            cfg = compose("config", overrides=["runtime.threads=1", *overrides])
        run = Run(tmp_path, cfg)
        with mock.patch.object(os, "sched_setaffinity", lambda *_: None, create=True):
            return Workspace(run.settings("evaluate"), run)

    yield make
    torch.set_num_threads(threads)
    GlobalHydra.instance().clear()


def test_a_simulated_device_is_asked_once_unless_it_is_noisy(workspace: Any) -> None:
    assert workspace("gpu.timing=simulated").rounds == Rounds(min_rounds=1, max_rounds=1)
    noisy = workspace("gpu.timing=simulated", "gpu.simulated.noise=0.02")
    assert noisy.rounds.min_rounds > 1 and noisy.monitor is None


def test_a_gpu_is_measured_more_sharply_than_a_cpu_unless_the_user_says(workspace: Any) -> None:
    noise = ("gpu.timing=simulated", "gpu.simulated.noise=0.02")
    gpu, cpu = workspace(*noise, "gpu=h100").rounds, workspace(*noise, "gpu=cpu").rounds
    assert gpu.precision == 0.005 < cpu.precision and gpu.max_rounds >= cpu.max_rounds
    assert workspace(*noise, "gpu=h100", "measure.precision=0.2").rounds == Rounds(0.2, 10, gpu.max_rounds, 12.0)


@pytest.mark.parametrize("runtime", ["eager", "compile"])
def test_a_latency_says_how_the_model_was_run(runtime: str, workspace: Any) -> None:
    work = workspace("gpu=cpu", f"runtime={runtime}")
    assert work.timed_as["runtime"] == work.clock.runtime == runtime
    assert work.monitor is not None


def test_a_stage_that_measures_depends_on_the_runtime_and_one_that_does_not_survives_another() -> None:
    for plan in PLANS.values():
        assert ("runtime.mode" in plan.reads) == plan.measures, plan.name
        assert "runtime" not in plan.reads and "runtime.threads" in plan.reads


def test_what_a_configuration_names_is_trusted_and_nothing_else(workspace: Any) -> None:
    target = "hawada.adapters.graph.GraphAdapter"
    own = ("data=digits", "schedule=digits", "model.adapter.arch=null", "model.adapter.weights=null")
    work = workspace("model=convnet", *own, "model.adapter.factory=mypackage.nets.resnet20", "gpu.timing=simulated")
    assert work.trust == [target, "mypackage.nets.resnet20"]
    assert workspace("model=convnet", "data=digits", "schedule=digits", "gpu.timing=simulated").trust == [target]
