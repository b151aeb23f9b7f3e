"""A latency table goes from the machine that measured it to one that trains by it; many targets from one training."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import command
import pytest

from hawada.core.finetune import Finetuner
from hawada.core.train import LagrangeTrainer

NAME = "tiny_resnet-local"
TINY = [
    "runtime.threads=1",
    "model.adapter.layers=[1,1,1,1]",
    "model.adapter.image_size=16",
    "data.image_size=16",
    "data.samples=105",
    "data.test_samples=100",
    "schedule.pretrain=1",
    "schedule.train=1",
    "schedule.finetune=1",
    "budget.batch=8",
    "profile.points=3",
    "profile.fitted_models=3",
    "profile.held_out_models=2",
    "finetune.recalibration_samples=0",
    "calibration.samples=0",
]


hawada = partial(command.hawada, *TINY)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile, a teacher and gates."""
    root = tmp_path_factory.mktemp("trained")
    for stage in ("profile", "pretrain", "train"):
        code, _, err = hawada("gpu.timing=simulated", f"output_dir={root}", f"stage={stage}")
        assert code == 0, err
    return root


@pytest.fixture
def table(trained: Path) -> Path:
    return trained / NAME / "profile" / "latency_table.json"


def test_a_table_from_elsewhere_stands_in_for_the_device_and_proves_nothing(
    table: Path, tmp_path: Path, no_reload: None
) -> None:
    code, out, err = hawada("gpu.timing=table", f"gpu.table={table}", f"output_dir={tmp_path}")
    assert code == 1, err
    result = read(tmp_path / NAME / "result.json")
    assert result["verdict"] == "unverified" and "not measured" in result["reason"]
    assert result["latency_ratio"]["median"] <= result["target_ratio"] == 0.6
    assert result["teacher"]["latency_ms"]["median"] == read(table)["result"]["teacher_ms"]
    assert (tmp_path / NAME / "finetune" / "slim" / "model.safetensors").is_file()
    assert "table of" in out


def changed(table: Path, folder: Path, **parts: Any) -> Path:
    """A copy of a table with some entries replaced; dictionaries are merged."""
    record = read(table)
    for key, value in parts.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) else value
    path = folder / "other_table.json"
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("parts", "overrides", "message"),
    [
        ({}, ["gpu=h100"], "was measured on .*, and gpu=h100 is H100"),
        ({"fingerprint": {"name": "NVIDIA A100", "device": "cuda"}}, ["gpu=h100"], "on NVIDIA A100 .*gpu=h100 is H100"),
        ({"fingerprint": {"torch": "1.13.0"}}, [], "with torch 1.13.0, and torch .* is here"),
        ({}, ["budget.batch=4"], "measured with batch 8, and batch 4 is asked for"),
        ({}, ["gpu.dtype=bfloat16"], "measured with dtype float32, and dtype bfloat16"),
        ({"timed_as": {"runtime": "cudagraph"}}, [], "measured with runtime cudagraph, and runtime eager"),
        ({}, ["model.adapter.layers=[1,1,1,2]"], "was measured for another model"),
        ({"sites": []}, [], "has other sites than the model"),
        ({"format": 0}, [], "is not a latency table of format 1"),
    ],
)
def test_a_table_of_another_device_stack_or_question_is_refused(
    table: Path, tmp_path: Path, parts: dict[str, Any], overrides: list[str], message: str
) -> None:
    path = changed(table, tmp_path, **parts)
    code, _, err = hawada(
        "gpu.timing=table", f"gpu.table={path}", f"output_dir={tmp_path}", "stage=profile", *overrides
    )
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert re.search(message, err), err


@pytest.mark.parametrize(("given", "message"), [("null", "needs one"), ("nowhere.json", "cannot read nowhere.json")])
def test_a_table_that_is_not_there_is_told(tmp_path: Path, given: str, message: str) -> None:
    code, _, err = hawada("gpu.timing=table", f"gpu.table={given}", f"output_dir={tmp_path}")
    assert code == 2 and message in err and "latency_table.json" in err


def test_many_targets_take_no_training_step(trained: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "out"))
    refuse = mock.Mock(side_effect=AssertionError("a training step"))
    with mock.patch.object(LagrangeTrainer, "_step", refuse), mock.patch.object(Finetuner, "fit", refuse):
        code, out, err = hawada(
            "gpu.timing=simulated", f"output_dir={root}", "stage=export", "budget.target_ratio=[0.6,0.8,0.7]"
        )
    assert code == 0, err
    front = root / NAME / "front"
    points = read(front / "result.json")["points"]
    assert [point["target_ratio"] for point in points] == [0.8, 0.7, 0.6]
    for point in points:
        reached = point["measured"]["ratio"]["median"]
        assert 0.85 * point["target_ratio"] <= reached <= point["target_ratio"]
        assert (front / f"{point['target_ratio']:g}" / "slim" / "model.safetensors").is_file()
    assert sorted((p["value"] for p in points), reverse=True) == [p["value"] for p in points]
    assert (front / "front.png").read_bytes().startswith(b"\x89PNG") and "0.7" in out
    assert not (root / NAME / "export").exists()


def test_a_new_target_needs_no_new_training(trained: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "out"))
    code, _, err = hawada("gpu.timing=simulated", f"output_dir={root}", "stage=export", "budget.target_ratio=0.75")
    assert code == 0, err
    assert read(root / NAME / "export" / "result.json")["measured"]["ratio"]["median"] <= 0.75


def test_a_target_out_of_reach_fails_after_the_others_are_saved(trained: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "out"))
    code, _, err = hawada(
        "gpu.timing=simulated", f"output_dir={root}", "stage=export", "budget.target_ratio=[0.8,0.01]"
    )
    points = read(root / NAME / "front" / "result.json")["points"]
    assert code == 1 and [point["status"] == "infeasible" for point in points] == [False, True], err
    assert (root / NAME / "front" / "0.8" / "slim").is_dir() and not (root / NAME / "front" / "0.01").exists()


@pytest.mark.parametrize("stage", ["pipeline", "train", "evaluate"])
def test_several_targets_are_for_the_export(tmp_path: Path, stage: str) -> None:
    code, _, err = hawada(f"output_dir={tmp_path}", f"stage={stage}", "budget.target_ratio=[0.8,0.6]")
    assert code == 2 and "several targets are for stage=export" in err
    code, _, err = hawada(f"output_dir={tmp_path}", "stage=export", "budget.target_ratio=[0.8,2]")
    assert code == 2 and "budget.target_ratio" in err
