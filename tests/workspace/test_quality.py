"""What the export does about quality, as configured: importance, sensitivity and reconstruction."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from hawada.config import conf_dir, register_resolvers, validate
from hawada.experiment import Run
from hawada.report import Progress
from hawada.stages import export, front, pretrain, profile, train
from hawada.workspace import Quality, Subject, open_stage

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"  # a network of 16 to 64 channels: reconstruction is quick
TINY = [
    "model=convnet",
    "data=digits",
    "schedule=digits",
    "model.adapter.arch=null",
    "model.adapter.factory=cifar_resnet.CifarResNet",
    "model.adapter.arguments={depth: 8}",
    "model.adapter.num_classes=10",
    "model.adapter.image_size=16",
    "model.adapter.weights=null",
    "model.pretrain=true",
    "gpu.timing=simulated",
    "gpu.multiple.channel=[4]",
    "runtime.threads=1",
    "data.image_size=16",
    "data.test_samples=1000",
    "schedule.pretrain=6",
    "schedule.train=0",
    "budget.batch=16",
    "budget.target_ratio=0.6",
    "budget.tolerance=0.1",
    "profile.points=3",
    "profile.fitted_models=2",
    "profile.held_out_models=2",
    "calibration.samples=128",
    "export.points=3",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[Subject, Any]]]:
    """Run stage=export (or front) with overrides, behind a teacher of some epochs and gates that were not trained."""
    threads = torch.get_num_threads()
    GlobalHydra.instance().clear()
    register_resolvers()
    root = tmp_path_factory.mktemp("quality")

    def configured(*overrides: str) -> Any:
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            return compose("config", [*TINY, f"output_dir={root}", "name=tiny", *overrides])

    with (
        mock.patch.object(os, "sched_setaffinity", lambda *_: None, create=True),
        mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]),
    ):
        run = Run(root / "tiny", configured())
        for stage in (profile, pretrain, train):
            stage.run(run.settings(stage.__name__.rpartition(".")[2]), run)

        def export_with(*overrides: str) -> tuple[Subject, Any]:
            cfg = configured(*overrides)
            again = Run(root / "tiny", cfg)
            many = "[" in str(cfg.budget.target_ratio)
            settings = again.settings("front" if many else "export")
            result = (front if many else export).run(settings, again)
            settings = OmegaConf.create({**settings, "evaluate": {"batch_size": 500}})
            return open_stage(settings, again)[0], result

        yield export_with
    torch.set_num_threads(threads)
    GlobalHydra.instance().clear()


@pytest.fixture(scope="module")
def accuracy_by_gates(trained: Any) -> float:
    """Of the widths that the gates alone choose."""
    return accuracy(trained("export.sensitivity=gates")[0])


def accuracy(subject: Subject, folder: str = "slim", stage: str = "export") -> float:
    model = subject.saved_model(stage, folder)
    return subject.task.score(model, subject.data.calibration_loader(128, 600), subject.pick).accuracy


def test_a_refitted_model_is_better_before_any_finetuning(trained: Any) -> None:
    subject, plain = trained("export.sensitivity=gates", "export.reconstruct=false")
    before = accuracy(subject)
    assert plain.refitted == 0 and plain.sensitivity is None
    subject, refitted = trained("export.sensitivity=gates")
    assert refitted.refitted > 0 and refitted.widths == plain.widths
    assert accuracy(subject) > before + 0.1
    subject, nothing = trained("calibration.samples=0")
    assert nothing.refitted == 0 and nothing.widths == plain.widths
    assert accuracy(subject) == before


@pytest.mark.parametrize("importance", ["gates", "obs", "magnitude", "fisher"])
def test_measured_sensitivity_is_kept_with_the_result(importance: str, trained: Any, accuracy_by_gates: float) -> None:
    subject, result = trained(f"importance={importance}")
    assert result.status == "on_target"
    assert set(result.sensitivity) == {group.name for group in subject.groups}
    assert all(min(costs.values()) == 0 for costs in result.sensitivity.values())
    assert result.equivalence.max_abs_diff <= 1e-5 * result.equivalence.max_abs_logit
    assert result.nats.refitted < result.nats.sliced
    assert accuracy(subject) > accuracy_by_gates - 0.02


def test_a_front_is_measured_once_and_refitted_for_each_target(trained: Any) -> None:
    subject, result = trained("budget.target_ratio=[0.8,0.6]")
    assert [point.refitted > 0 for point in result.points] == [True, True]
    assert 0 < result.seconds.measuring < result.seconds.all
    assert set(result.sensitivity) == {group.name for group in subject.groups}
    assert accuracy(subject, "0.8/slim", "front") >= accuracy(subject, "0.6/slim", "front") - 0.02


def test_quality_is_measured_in_eval_mode_however_the_models_come(trained: Any) -> None:
    """BatchNorm of a teacher in training mode would read other statistics, and change them."""
    subject, result = trained()
    keep = {
        name: tuple(kept)
        for name, kept in json.loads((subject.store.folder("export") / "keep.json").read_text()).items()
    }
    sensitivities, refits = [], []
    for training in (False, True):
        teacher = subject.teacher()
        student = export.load_student(subject, teacher).train(training)
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        with Progress("export", 1) as progress:
            quality = Quality(subject, student, teacher.train(training), progress, has_target=True)
            slim, _ = quality.reconstructed(subject.slim(student.model, keep), keep)
        assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
        sensitivities.append(quality.sensitivities)
        refits.append(slim.state_dict())
    assert sensitivities[0] == sensitivities[1] == result.sensitivity is not None
    assert all(torch.equal(tensor, refits[1][name]) for name, tensor in refits[0].items())


def test_widths_of_the_gates_are_not_measured(trained: Any) -> None:
    assert trained("export.widths=gates")[1].sensitivity is None


def test_an_importance_that_cannot_compare_groups_needs_a_measured_sensitivity() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("config", ["importance=obs", "export.sensitivity=gates"])
    with pytest.raises(ValueError, match=r"^importance: .*ObsImportance .*set export\.sensitivity=measured"):
        validate(cfg)
    GlobalHydra.instance().clear()
