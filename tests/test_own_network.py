"""A network of the user's own: a function in the working directory, its checkpoint, and a folder of photos."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import command
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

NET = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.second = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x):
        return x + self.second(torch.relu(self.norm(self.first(x))))


def net({arguments}):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), Block(16), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), Block(32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, {classes}),
    )
"""
QUICK = [  # this is what makes a test of the command: nothing of it is needed
    "gpu.timing=simulated",
    "runtime.threads=1",
    "schedule.train=1",
    "schedule.steps_per_epoch=2",
    "schedule.finetune=1",
    "schedule.batch_size=8",
    "profile.points=3",
    "profile.fitted_models=2",
    "profile.held_out_models=2",
    "calibration.samples=8",
    "export.points=2",
    "finetune.recalibration_samples=8",
]


def prepare(folder: Path, arguments: str = "num_classes", classes: str = "num_classes") -> Path:
    """Write a package, a checkpoint as DataParallel leaves it, and photos of 24 x 32 pixels in three classes."""
    (folder / "mypackage").mkdir()
    (folder / "mypackage" / "__init__.py").write_text(NET.format(arguments=arguments, classes=classes))
    space: dict[str, object] = {}
    exec((folder / "mypackage" / "__init__.py").read_text(), space)
    build = space["net"]
    assert callable(build)
    torch.manual_seed(0)
    model = build(3) if arguments else build()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "net.pth")
    draw = np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        (folder / "photos" / name).mkdir(parents=True)
        for index in range(12):
            pixels = draw.integers(0, 255, (24, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{index}.png")
    return folder


def hawada(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, as the installed script does: that folder is not on Python's path."""
    starts = [sys.executable, "-P", "-c", "from hawada.cli import main; main()", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(starts, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a command that runs in this process, which forgets what it imported from there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        if name.partition(".")[0] in ("mypackage", "several"):
            del sys.modules[name]


GIVEN = ("model=convnet", "model.path=net.pth", "data.root=photos")
FACTORY = "model.adapter.factory=mypackage.net"


def assert_verdict(folder: Path, stderr: str, num_classes: int | None) -> None:
    result = folder / "outputs" / "convnet-local" / "result.json"
    assert result.is_file(), stderr
    assert json.loads(result.read_text())["verdict"] == "simulated"
    recorded = OmegaConf.load(result.parent / "train" / "config.yaml").model.adapter
    assert recorded.image_size == [24, 32] and recorded.num_classes == num_classes


def test_an_own_network_reaches_a_verdict_by_one_command(tmp_path):
    prepare(tmp_path)
    done = hawada(tmp_path, *GIVEN, FACTORY, "data.workers=0", *QUICK)
    assert_verdict(tmp_path, done.stderr, num_classes=3)


def test_a_factory_may_fix_the_number_of_classes(inside, reload_here):
    prepare(inside, "", "3")
    done = command.hawada(*GIVEN, FACTORY, "data.workers=0", *QUICK)
    assert_verdict(inside, done.err, num_classes=None)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("mypackage.nett", r"model.adapter.factory: mypackage.nett cannot be imported"),
        ("mypackage.nn", r"model.adapter.factory: mypackage.nn is a module; name the function or class in it"),
        ("mypackage.nn.Linear", r"model.adapter.factory: mypackage.nn.Linear is not defined in mypackage"),
        ("mypackage.Block", r"Block"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_timed(factory, message, inside):
    prepare(inside)
    done = command.hawada(*GIVEN, f"model.adapter.factory={factory}")
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1, done.err
    assert not (inside / "outputs").exists()


SEVERAL = """
import torch
from torch import nn
from torch.utils.data import Dataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.see = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.know, self.where, self.what = nn.Linear(4, 16), nn.Linear(16, 2), nn.Linear(16, 5)

    def forward(self, image, table):
        features = self.see(image) + torch.relu(self.know(table))
        return {"where": 100 * self.where(features), "what": self.what(features)}


class Samples(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"table": torch.randn(4, generator=generator), "image": torch.randn(3, 16, 16, generator=generator)}


def loaders():
    return Samples(), Samples()


def trained():
    torch.manual_seed(0)
    return Net()
"""


SEVERAL_INPUTS = [
    "model=convnet",
    "model.adapter.factory=several.trained",
    "model.adapter.example={image: [3, 16, 16], table: [4]}",
    "data._target_=several.loaders",
]


def test_several_inputs_and_outputs_without_labels_reach_a_verdict(inside, reload_here):
    (inside / "several.py").write_text(SEVERAL)
    done = command.hawada(
        *SEVERAL_INPUTS,
        "task=outputs",
        "budget.target_ratio=0.9",
        *QUICK,
    )
    result = inside / "outputs" / "convnet-local" / "result.json"
    assert result.is_file(), done.err
    found = json.loads(result.read_text())
    assert found["metric"] == "output_error" and found["teacher"]["output_error"] == 0
    assert 0 < found["slim"]["output_error"] < 2 and found["slim"]["params"] < found["teacher"]["params"]


def test_several_outputs_are_no_classes(inside):
    (inside / "several.py").write_text(SEVERAL)
    done = command.hawada(
        *SEVERAL_INPUTS,
        *QUICK,
    )
    assert done.code == 2 and "task: convnet returns (2,), (5,) for a sample" in done.err, done.err
    assert "set task=outputs" in done.err and not (inside / "outputs").exists()


@pytest.mark.parametrize(("inner", "takes"), [("num_classes=3", 3), ("classes=3", None)])
def test_any_keywords_take_the_number_of_classes_where_what_they_reach_does(inside, inner, takes):
    prepare(inside)
    name = inner.partition("=")[0]
    code = f"import mypackage\n\n\ndef net(**given):\n    return inner(**given)\n\n\ndef inner({inner}):\n"
    (inside / f"given_{name}.py").write_text(code + f"    return mypackage.net({name})\n")
    given = ["model=convnet", f"model.adapter.factory=given_{name}.net", "data.root=photos", "stage=inspect"]
    done = command.hawada(*given)
    assert done.code == 0, done.err
    config = OmegaConf.load(inside / "outputs" / "convnet-local" / "inspect" / "config.yaml")
    assert config.model.adapter.num_classes == takes
