"""The run directory: resumed, never overwritten unasked, locked, and honest about what each stage read."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError
from stage_results import example

from hawada.config import conf_dir, register_resolvers
from hawada.experiment import PLANS, Run, order, upstream
from hawada.experiment.results import StageResult
from hawada.stages import pipeline

HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


@pytest.fixture(autouse=True)
def hydra_is_fresh() -> Iterator[None]:
    GlobalHydra.instance().clear()
    register_resolvers()
    yield
    GlobalHydra.instance().clear()


@cache
def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose("config", overrides=["gpu.timing=simulated", *overrides])


def make_run(root: Path, *overrides: str, **options: Any) -> Run:
    return Run(root, copy.deepcopy(config(*overrides)), **options)


def finish(run: Run, *stages: str, note: str = "") -> None:
    """Stand in for stages: write what a finished one leaves."""
    for stage in stages:
        with run.writing(stage) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "data.bin").write_bytes(f"{stage} {note}".encode())
            run.record([folder / "deep" / "data.bin"])
            run.finish(stage, example(stage, summary=note))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the stage `profile` by one that only leaves a trace; returns the traces."""
    from hawada.stages import profile

    seen: list[str] = []

    def run(cfg: DictConfig, run: Run) -> StageResult:
        seen.append("profile")
        finish(run, "profile", note=f"attempt {len(seen)}")
        return run.result("profile")

    monkeypatch.setattr(profile, "run", run)
    return seen


def test_a_finished_stage_is_not_run_again_with_the_same_configuration(tmp_path: Path, calls: list[str]) -> None:
    first = pipeline.run_stage("profile", make_run(tmp_path))
    again = pipeline.run_stage("profile", make_run(tmp_path))
    assert calls == ["profile"]
    assert first.summary == again.summary == "attempt 1"


def test_a_key_that_a_stage_does_not_read_does_not_matter_to_it(tmp_path: Path, calls: list[str]) -> None:
    pipeline.run_stage("profile", make_run(tmp_path))
    pipeline.run_stage("profile", make_run(tmp_path, "lambda.lr=0.25", "budget.target_ratio=0.4", "schedule.train=3"))
    assert calls == ["profile"]


def test_results_of_another_configuration_are_not_overwritten_unasked(tmp_path: Path, calls: list[str]) -> None:
    pipeline.run_stage("profile", make_run(tmp_path))
    with pytest.raises(ValueError, match=r"profile\.points=9.*name=.*overwrite=true") as caught:
        pipeline.run_stage("profile", make_run(tmp_path, "profile.points=5"))
    assert "\n" not in str(caught.value)
    assert calls == ["profile"]
    assert make_run(tmp_path).result("profile").summary == "attempt 1"


def test_results_from_before_there_was_a_key_are_refused_by_its_name(tmp_path: Path, calls: list[str]) -> None:
    run = make_run(tmp_path)
    pipeline.run_stage("profile", run)
    path = run.folder("profile") / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["config"]["profile.points"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"made with no profile\.points; choose another name=.*overwrite=true"):
        pipeline.run_stage("profile", make_run(tmp_path))
    assert calls == ["profile"]


def test_overwrite_redoes_a_stage_whose_configuration_changed(tmp_path: Path, calls: list[str]) -> None:
    pipeline.run_stage("profile", make_run(tmp_path))
    redone = pipeline.run_stage("profile", make_run(tmp_path, "profile.points=5", overwrite=True))
    assert calls == ["profile", "profile"]
    assert redone.summary == "attempt 2"
    assert make_run(tmp_path, "profile.points=5").check("profile")  # and the new configuration is what counts now


def test_overwrite_keeps_a_stage_whose_configuration_is_the_same(tmp_path: Path, calls: list[str]) -> None:
    pipeline.run_stage("profile", make_run(tmp_path))
    pipeline.run_stage("profile", make_run(tmp_path, overwrite=True))
    assert calls == ["profile"]


@pytest.mark.parametrize("damage", ["more", "less"])
def test_results_of_another_version_are_refused_or_replaced(damage: str, tmp_path: Path, calls: list[str]) -> None:
    run = make_run(tmp_path)
    with run.writing("profile"):
        run.finish("profile", example("profile"))
    path = run.folder("profile") / "result.json"
    result = json.loads(path.read_text())
    if damage == "more":
        result["judged"] = {}
    else:
        del result["teacher_ms"]
    path.write_text(json.dumps(result))
    manifest = json.loads((run.folder("profile") / "manifest.json").read_text())
    manifest["files"]["result.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (run.folder("profile") / "manifest.json").write_text(json.dumps(manifest))
    message = r"profile/result\.json is not what this version writes \((judged|teacher_ms): .*\); run stage=profile "
    for act in (lambda run: pipeline.run_stage("profile", run), lambda run: run.result("profile")):
        with pytest.raises(ValueError, match=message + r"with overwrite=true, or choose another name=") as caught:
            act(make_run(tmp_path))
        assert "\n" not in str(caught.value)
    assert calls == []
    assert pipeline.run_stage("profile", make_run(tmp_path, overwrite=True)).summary == "attempt 1"


def test_a_folder_without_a_manifest_is_done_again_from_scratch(tmp_path: Path, calls: list[str]) -> None:
    run = make_run(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.writing("profile") as folder:
        (folder / "proxy.json").write_text("{")
        raise KeyboardInterrupt
    assert not run.is_finished("profile") and not run.check("profile")
    pipeline.run_stage("profile", run)
    assert calls == ["profile"]
    assert not (tmp_path / "profile" / "proxy.json").exists()


@pytest.mark.parametrize("name", ["result.json", "deep/data.bin"])
def test_a_finished_stage_whose_file_was_changed_is_redone(name: str, tmp_path: Path, calls: list[str]) -> None:
    """The file has the same size and the same time of change: only its content tells."""
    run = make_run(tmp_path)
    pipeline.run_stage("profile", run)
    path = run.folder("profile") / name
    before, times = path.read_bytes(), path.stat()
    path.write_bytes(before.replace(b"1", b"7"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.read_bytes() != before and path.stat().st_size == times.st_size
    assert not make_run(tmp_path).is_finished("profile")
    assert pipeline.run_stage("profile", make_run(tmp_path)).summary == "attempt 2"
    assert calls == ["profile", "profile"]


def test_a_stage_that_is_begun_again_is_not_finished_meanwhile(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    finish(run, "profile")
    with run.writing("profile") as folder:
        assert not run.is_finished("profile")
        assert sorted(path.name for path in folder.iterdir()) == ["config.yaml"]


def test_the_manifest_holds_the_checksum_of_every_file(tmp_path: Path) -> None:
    finish(make_run(tmp_path), "profile")
    folder = tmp_path / "profile"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert manifest["files"] == {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    assert set(manifest["files"]) == {"config.yaml", "result.json", "deep/data.bin"}


def test_the_manifest_holds_the_configuration_that_the_stage_read(tmp_path: Path) -> None:
    finish(make_run(tmp_path, "profile.points=7"), "profile")
    recorded = json.loads((tmp_path / "profile" / "manifest.json").read_text())["config"]
    assert recorded["profile.points"] == 7
    assert recorded["seed"] == 0
    assert not any(key.startswith(("lambda", "kd", "data")) for key in recorded)


def test_a_stage_needs_those_before_it_and_names_the_one_to_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(ValueError, match=r"stage=export.*run stage=profile first, or stage=pipeline"):
        run.check_upstream("export")
    finish(run, *(stage for stage in upstream("export", run.cfg) if stage != "train"))
    with pytest.raises(ValueError, match=r"stage=export.*run stage=train first"):
        run.check_upstream("export")
    finish(run, "train")
    run.check_upstream("export")


def test_a_changed_upstream_key_is_refused_by_name(tmp_path: Path) -> None:
    finish(make_run(tmp_path), "profile", "pretrain")
    with pytest.raises(ValueError, match=r"stage=train: profile ran with profile\.points=9;.*overwrite=true"):
        pipeline.run_stage("train", make_run(tmp_path, "profile.points=5"))


def test_a_changed_upstream_key_is_refused_by_a_finished_stage_too(tmp_path: Path) -> None:
    """`hawada stage=train profile.points=5` must not answer with gates that were trained on nine points."""
    finish(make_run(tmp_path), "profile", "pretrain", "train")
    with pytest.raises(ValueError, match=r"profile\.points=9"):
        pipeline.run_stage("train", make_run(tmp_path, "profile.points=5"))


def test_what_was_made_from_a_redone_stage_is_stale(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    stages = order(run.cfg)
    finish(run, *stages)
    assert all(run.check(stage) for stage in stages)
    finish(run, "export", note="another choice")
    assert [stage for stage in stages if not run.check(stage)] == ["finetune", "evaluate"]
    finish(run, "finetune", "evaluate")
    assert all(run.check(stage) for stage in stages)


@pytest.mark.parametrize("held", ["here", "shared"])
def test_a_directory_that_another_process_uses_is_refused(held: str, tmp_path: Path) -> None:
    root, shared = tmp_path / "here", tmp_path / "shared"
    (tmp_path / held).mkdir()
    lock = tmp_path / held / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "held\n"
        run = make_run(root, shared=shared)
        with pytest.raises(ValueError, match=f"{held} is in use by another run.*name="), run.locked():
            pytest.fail("the lock was handed out twice")
        other.stdin.close()
        other.wait()
    with run.locked():  # free again once the other has ended, whatever became of it
        pass


def test_a_directory_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = make_run(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match=r"output_dir: cannot write to .*set output_dir to"), run.locked():
        pytest.fail("the lock was handed out")


def test_a_stage_sees_the_keys_that_it_reads_and_no_others(tmp_path: Path) -> None:
    settings = make_run(tmp_path).settings("finetune")
    assert settings.kd.temperature == 2.0
    assert settings.finetune.trainer.epochs == 30  # interpolations are resolved: schedule itself is not there
    assert list(settings.gpu) == ["device"]
    for key in ("budget", "schedule", "lambda", "train"):
        with pytest.raises(ConfigAttributeError):
            getattr(settings, key)


@pytest.mark.parametrize("stage", PLANS)
def test_every_stage_is_handed_exactly_what_its_plan_says(stage: str, tmp_path: Path) -> None:
    settings = make_run(tmp_path).settings(stage)
    assert set(settings) == {key.partition(".")[0] for key in PLANS[stage].reads}


PIPELINE = set(PLANS) - {"doctor", "front"}


@pytest.mark.parametrize(
    ("swept", "own"),
    [
        (["lambda.lr"], {"train", "export", "finetune", "evaluate", "publish"}),
        (["budget.target_ratio"], {"train", "export", "finetune", "evaluate", "publish"}),
        (["export.widths"], {"export", "finetune", "evaluate", "publish"}),
        (["finetune.trainer.lr"], {"finetune", "evaluate", "publish"}),
        (["kd.temperature", "lambda"], {"train", "export", "finetune", "evaluate", "publish"}),
        (["pretrain.trainer.lr"], {"pretrain", "train", "export", "finetune", "evaluate", "publish"}),
        (["profile.points"], {"profile", "train", "export", "finetune", "evaluate", "publish"}),
        (["export.formats"], {"publish"}),
        (["gpu"], PIPELINE),
        (["seed"], PIPELINE),
        ([], set()),
    ],
)
def test_in_a_multirun_what_no_swept_key_touches_is_shared(swept: list[str], own: set[str], tmp_path: Path) -> None:
    job, shared = tmp_path / "job", tmp_path / "shared"
    run = make_run(job, shared=shared, swept=swept)
    assert {stage for stage in PIPELINE if run.folder(stage) == job / stage} == own
    assert {stage for stage in PIPELINE if run.folder(stage) == shared / stage} == PIPELINE - own
