"""How long a stage measures, and what its figures are called; every stage that measures does it alike."""

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
from hawada.interlingua.stages.parts import InterlinguaParts
from hawada.workspace import ModelStopwatch, Subject, open_stage


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """A function from overrides to what a stage works with."""
    threads = torch.get_num_threads()

    def make(*overrides: str, stage: str = "evaluate") -> Any:
        GlobalHydra.instance().clear()
        register_resolvers()
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            cfg = compose("config", overrides=["runtime.threads=1", *overrides])
        run = Run(tmp_path, cfg)
        with mock.patch.object(os, "sched_setaffinity", lambda *_: None, create=True):
            if stage.startswith("interlingua"):
                return InterlinguaParts(run.settings(stage), run)
            return open_stage(run.settings(stage), run)

    yield make
    torch.set_num_threads(threads)
    GlobalHydra.instance().clear()


@pytest.fixture
def stopwatch(opened: Any) -> Any:
    """A function from overrides to the stopwatch of stage=evaluate."""

    def make(*overrides: str) -> ModelStopwatch:
        return opened(*overrides)[1]

    return make


@pytest.fixture
def subject(opened: Any) -> Any:
    """A function from overrides to the model of stage=evaluate."""

    def make(*overrides: str) -> Subject:
        return opened(*overrides)[0]

    return make


def test_a_simulated_device_is_asked_once_unless_it_is_noisy(stopwatch: Any) -> None:
    assert stopwatch("gpu.timing=simulated").rounds == Rounds(min_rounds=1, max_rounds=1)
    noisy = stopwatch("gpu.timing=simulated", "gpu.simulated.noise=0.02")
    assert noisy.rounds.min_rounds > 1 and noisy.monitor is None


def test_a_gpu_is_measured_more_sharply_than_a_cpu_unless_the_user_says(stopwatch: Any) -> None:
    noise = ("gpu.timing=simulated", "gpu.simulated.noise=0.02")
    gpu, cpu = stopwatch(*noise, "gpu=h100").rounds, stopwatch(*noise, "gpu=cpu").rounds
    assert gpu.precision == 0.005 < cpu.precision and gpu.max_rounds >= cpu.max_rounds
    assert stopwatch(*noise, "gpu=h100", "measure.precision=0.2").rounds == Rounds(0.2, 10, gpu.max_rounds, 12.0)


@pytest.mark.parametrize("runtime", ["eager", "compile"])
def test_a_latency_says_how_the_model_was_run(runtime: str, stopwatch: Any) -> None:
    watch = stopwatch("gpu=cpu", f"runtime={runtime}")
    assert watch.timed_as["runtime"] == watch.clock.runtime == runtime
    assert watch.monitor is not None


def test_a_stage_that_measures_depends_on_the_runtime_and_one_that_does_not_survives_another() -> None:
    for plan in PLANS.values():
        assert ("runtime.mode" in plan.reads) == plan.measures, plan.name
        assert "runtime" not in plan.reads and "runtime.threads" in plan.reads


def test_what_a_configuration_names_is_trusted_and_nothing_else(subject: Any) -> None:
    target = "hawada.adapters.graph.GraphAdapter"
    own = ("data=digits", "schedule=digits", "model.adapter.arch=null", "model.adapter.weights=null")
    own_factory = subject(
        "model=convnet", *own, "model.adapter.factory=mypackage.nets.resnet20", "gpu.timing=simulated"
    )
    assert own_factory.trust == [target, "mypackage.nets.resnet20"]
    assert subject("model=convnet", "data=digits", "schedule=digits", "gpu.timing=simulated").trust == [target]


@pytest.mark.parametrize("overrides", [("gpu=cpu",), ("gpu=cpu", "measure.precision=0.02", "measure.max_seconds=3")])
def test_every_stage_that_measures_has_the_same_rounds(overrides: tuple[str, ...], opened: Any) -> None:
    _, expected, _ = opened(*overrides)
    for stage in ("doctor", "profile", "train", "export"):
        assert opened(*overrides, stage=stage)[1].rounds == expected.rounds
    latents = opened(*overrides, stage="interlingua-eval").watch
    assert latents.rounds == expected.rounds and latents.rounds.max_rounds == 400
    assert type(latents.monitor) is type(expected.monitor)


def test_prompts_are_not_looked_up_in_a_table_of_sites(opened: Any) -> None:
    parts = opened("gpu.timing=table", stage="interlingua-eval")
    message = (
        r"gpu\.timing: no latency table holds the prompts of language models; set gpu\.timing=measured, or gpu\.tim"
    )
    with pytest.raises(ValueError, match=message):
        parts.check()
