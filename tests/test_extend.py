"""Everything a user may replace comes from an outside package, through overrides alone, and is really used."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import command
import pytest
import torch

import hawada as package

NAME = "tiny_resnet-local"
TINY = [
    "gpu.timing=simulated",
    "runtime.threads=1",  # threads that wait for each other stand still on a busy machine
    "model.adapter.image_size=16",
    "data.image_size=16",
    "data.samples=105",
    "data.test_samples=100",
    "schedule.pretrain=1",
    "schedule.train=1",
    "schedule.finetune=1",
    "budget.batch=8",
    "budget.target_ratio=0.8",
    "profile.points=3",
    "profile.fitted_models=2",
    "profile.held_out_models=2",
    "finetune.recalibration_samples=0",
    "calibration.samples=0",
]
BLOCKS = "model.adapter.layers=[1,1,1,1]"

OUTSIDE = '''
"""A package that knows HawAda; HawAda does not know it."""

import torch
from torch import nn

from hawada.adapters.base import Adapter
from hawada.core.gates import SigmoidGate
from hawada.core.latency.proxy import Term
from hawada.core.structure import Cut, GatePoint, Group, Site


class ClosedGate(SigmoidGate):
    """The other way round: a large theta closes."""

    @property
    def gate(self):
        return self.hard if self.hard is not None else torch.sigmoid(-self.theta)


class Loss:
    """42, whatever comes."""

    def __init__(self, temperature, mse_weight):
        self.temperature, self.mse_weight = temperature, mse_weight

    def __call__(self, student_logits, teacher_logits):
        return (student_logits - teacher_logits).sum() * 0 + 42.0


class Penalty:
    """A constant, so that its share in the sum can be told."""

    def __init__(self, value):
        self.value = value

    def __call__(self, gates, groups):
        assert set(gates) == {group.name for group in groups}
        return self.value + 0 * next(iter(gates.values())).sum()


class Backwards:
    """The last units matter most."""

    def rank(self, student, model, *, groups, calibration):
        assert len(calibration.batches) > 0
        return {group.name: torch.arange(group.units).float() for group in groups}


class Proxy:
    """A hundredth of a millisecond per unit; learns nothing, but counts what it is told."""

    def __init__(self, table, pull, clock):
        self.table, self.samples = table, 0

    def predict(self, widths):
        return 0.01 * sum(torch.as_tensor(width, dtype=torch.float64) for width in widths.values())

    def terms(self):
        names = sorted({name for entry in self.table.sites for name in entry.site.groups})
        return [Term((name,), lambda width: 0.01 * width) for name in names]

    def add_sample(self, widths, ms, weight=1.0):
        self.samples += 1

    def state(self):
        return {"counted": self.samples}

    def load_state(self, state):
        self.samples = state["counted"]


class Clock:
    """A device that takes a microsecond per parameter, however it runs a model."""

    simulated = False

    def __init__(self, runtime):
        pass

    def prepare(self, model, inputs):
        milliseconds = 1e-3 + 1e-3 * sum(parameter.numel() for parameter in model.parameters())
        return lambda: milliseconds


class SimulatedDevice(Clock):
    """The same as a rehearsal; the numbers that describe another simulated device mean nothing to it."""

    simulated = True

    def __init__(self, tflops, gbps, launch_us, tile, noise):
        pass


class Finetuner:
    """Writes a seven into the last bias and calls that training."""

    def __init__(self, epochs, lr, weight_decay, label_weight, bias=7.0):
        self.epochs, self.bias = epochs, bias

    def fit(self, model, loader, **_):
        assert len(loader) > 0
        with torch.no_grad():
            model.fc.bias.fill_(self.bias)
        return model.eval()


class Net(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.Conv2d(width, 8, 3, 2), nn.ReLU())
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class NetAdapter(Adapter):
    """One group: the channels between the two convolutions."""

    def __init__(self, width=64, num_classes=10, image_size=16):
        self.width, self.num_classes, self.image_size = width, num_classes, image_size

    def skeleton(self):
        return Net(self.width, self.num_classes).eval()

    def teacher(self):
        raise ValueError("trained here")

    def groups(self, model):
        cuts = (
            Cut("body.0.weight", 0, follows="out_channels"),
            Cut("body.0.bias", 0),
            Cut("body.2.weight", 1, follows="in_channels"),
        )
        return [Group("inner", "channel", self.width, (GatePoint("body.0"),), cuts)]

    def sites(self, model):
        return [Site("body", ("inner",), "body")]

    def example_inputs(self, shape):
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(shape.batch, 3, self.image_size, self.image_size, generator=generator),)


class ScoringNet(Net):
    def forward(self, x):
        return {"scores": super().forward(x)}


class ScoringAdapter(NetAdapter):
    """A model whose output holds the logits, as those of many libraries do."""

    def skeleton(self):
        return ScoringNet(self.width, self.num_classes).eval()

    def logits(self, output):
        return output["scores"]
'''


hawada = partial(command.hawada, *TINY)


def run(output_dir: Path, stage: str, *overrides: str) -> dict[str, Any]:
    """Run one stage of the tiny ResNet; returns its result."""
    code, _, err = hawada(BLOCKS, f"output_dir={output_dir}", f"stage={stage}", *overrides)
    assert code == 0, err
    return json.loads((output_dir / NAME / stage / "result.json").read_text())


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The outside package, importable here and in processes that are started from here."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "outside_parts").mkdir()
    (folder / "outside_parts" / "__init__.py").write_text(OUTSIDE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield importlib.import_module("outside_parts")
    sys.modules.pop("outside_parts", None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with HawAda's own parts, done up to the export."""
    folder = tmp_path_factory.mktemp("exported")
    for stage in ("profile", "pretrain", "train", "export"):
        run(folder, stage)
    return folder


@pytest.fixture
def experiment(exported: Path, outside: ModuleType, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(exported, tmp_path / "out")
    return tmp_path / "out"


def result_of(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / NAME / stage / "result.json").read_text())


def test_a_gate(experiment: Path) -> None:
    own = result_of(experiment, "train")["open_units"]
    assert min(own.values()) > 0
    open_units = run(experiment, "train", "overwrite=true", "gate._target_=outside_parts.ClosedGate")["open_units"]
    assert set(open_units) == set(own)
    assert max(open_units.values()) == 0  # theta starts at 4, which closes these


def test_a_gate_is_also_what_the_export_reads(experiment: Path) -> None:
    overrides = ["overwrite=true", "gate._target_=outside_parts.ClosedGate", "budget.target_ratio=null"]
    run(experiment, "train", *overrides)
    widths = run(experiment, "export", *overrides)["widths"]
    assert all(width == 0 for name, width in widths.items() if name.endswith("branch"))


def test_a_loss(experiment: Path) -> None:
    assert result_of(experiment, "train")["kd"] != 42
    assert run(experiment, "train", "overwrite=true", "kd._target_=outside_parts.Loss")["kd"] == 42


def test_a_penalty_is_added_to_those_that_are_there(experiment: Path) -> None:
    assert result_of(experiment, "train")["penalty"] == 0
    mine = "+penalty.mine={_target_: outside_parts.Penalty, value: 3.5}"
    assert run(experiment, "train", "overwrite=true", mine)["penalty"] == 3.5


def test_an_importance(experiment: Path) -> None:
    overrides = ["overwrite=true", "calibration.samples=64", "export.points=2", "export.reconstruct=false"]
    run(experiment, "export", *overrides, "export.importance._target_=outside_parts.Backwards")
    keep = json.loads((experiment / NAME / "export" / "keep.json").read_text())
    pruned = {name: 64 * 2 ** (int(name[5]) - 1) for name in keep if name.endswith("conv1")}
    assert any(0 < len(keep[name]) < units for name, units in pruned.items())
    for name, units in pruned.items():
        assert keep[name] == list(range(units - len(keep[name]), units))


def test_a_proxy(experiment: Path) -> None:
    overrides = ["overwrite=true", "proxy._target_=outside_parts.Proxy"]
    profile = run(experiment, "profile", *overrides)
    for model, held_out in zip(profile["models"][-2:], profile["held_out"], strict=True):
        assert held_out["predicted_ms"] == pytest.approx(0.01 * sum(model["widths"].values()))
    assert json.loads((experiment / NAME / "profile" / "proxy.json").read_text()) == {"counted": 6}
    trained = run(experiment, "train", *overrides)  # 964 units in eight groups, nearly all of them still open
    assert trained["proxy_ms"] == pytest.approx(0.01 * sum(profile["models"][0]["widths"].values()), rel=0.1)


def test_a_clock(experiment: Path) -> None:
    overrides = ["overwrite=true", "gpu=cpu", "gpu.timing=measured", "gpu.clock._target_=outside_parts.Clock"]
    run(experiment, "profile", f"name={NAME}", *overrides)
    teacher = package.load(experiment / NAME / "pretrain" / "teacher")
    parameters = sum(parameter.numel() for parameter in teacher.parameters())
    profile = result_of(experiment, "profile")
    assert profile["teacher_ms"] == pytest.approx(1e-3 + 1e-3 * parameters)
    assert profile["simulated"] is False


def test_a_simulated_clock(experiment: Path) -> None:
    own = result_of(experiment, "profile")["teacher_ms"]
    profile = run(experiment, "profile", "overwrite=true", "gpu.simulated._target_=outside_parts.SimulatedDevice")
    parameters = sum(p.numel() for p in package.load(experiment / NAME / "pretrain" / "teacher").parameters())
    assert profile["teacher_ms"] == pytest.approx(1e-3 + 1e-3 * parameters) != own
    assert profile["simulated"] is True


def test_a_finetuner(experiment: Path) -> None:
    overrides = ["finetune.trainer._target_=outside_parts.Finetuner", "+finetune.trainer.bias=7.5"]
    run(experiment, "finetune", *overrides)
    slim = package.load(experiment / NAME / "finetune" / "slim")
    assert torch.equal(slim.fc.bias, torch.full((10,), 7.5))


def run_adapter(output_dir: Path, adapter: str) -> dict[str, Any]:
    """The whole pipeline with an outside adapter; returns its result."""
    overrides = [f"model.adapter._target_=outside_parts.{adapter}", "+model.adapter.width=48"]
    removed = ["~model.adapter.arch", "~model.adapter.layers", "~model.adapter.stream"]
    code, _, err = hawada(f"output_dir={output_dir}", "name=mine", *overrides, *removed)
    assert code == 0, err
    return json.loads((output_dir / "mine" / "result.json").read_text())


def test_an_adapter_carries_its_own_model_through_the_whole_pipeline(
    outside: ModuleType, tmp_path: Path, no_reload: None
) -> None:
    result = run_adapter(tmp_path, "NetAdapter")
    assert result["verdict"] == "simulated"
    with pytest.raises(ValueError, match=r"outside_parts\.NetAdapter.*trust=\['outside_parts\.'\]"):
        package.load(result["slim"]["path"])
    slim = package.load(result["slim"]["path"], trust=["outside_parts."])
    assert isinstance(slim, outside.Net)
    assert slim.body[0].out_channels == slim.body[2].in_channels < 48
    assert slim(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_an_adapter_says_where_the_logits_are_in_a_models_output(outside: ModuleType, tmp_path: Path) -> None:
    result = run_adapter(tmp_path, "ScoringAdapter")
    slim = package.load(result["slim"]["path"], trust=["outside_parts."])
    assert slim(torch.randn(2, 3, 16, 16))["scores"].shape == (2, 10)


def test_a_part_that_cannot_be_imported_is_named_in_one_sentence(experiment: Path) -> None:
    code, _, err = hawada(
        BLOCKS, f"output_dir={experiment}", "stage=train", "overwrite=true", "gate._target_=outside_parts.Missing"
    )
    assert code == 2
    assert len(err.splitlines()) == 1 and "outside_parts.Missing" in err
