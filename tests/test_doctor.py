"""`stage=doctor` as a command, on simulated devices and on a clock of the test's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from command import Outcome, hawada
from torch import nn

from hawada.core.latency import SimulatedClock
from hawada.core.structure import Inputs

RESNET = ("model=tiny_resnet", "model.adapter.layers=[1,1,1,1]", "model.adapter.image_size=16", "budget.batch=16")
LLAMA = (
    "model=tiny_llama",
    "model.adapter.config.num_hidden_layers=2",
    "budget.prompt=16",
    "budget.new_tokens=4",
    "budget.batch=2",
)
QUICK = ("stage=doctor", "name=run", "runtime.threads=1", "doctor.points=8")
SIMULATED = "gpu.timing=simulated"


def doctor(folder: Path, *arguments: str) -> tuple[Outcome, dict[str, Any]]:
    """The outcome of a command that must succeed, and its result."""
    outcome = hawada(*QUICK, f"output_dir={folder}", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome, json.loads((folder / "run" / "doctor" / "result.json").read_text())


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, dict[str, Any]]:
    """A folder with the diagnosis of a ResNet, what was shown of it, and its result."""
    folder = tmp_path_factory.mktemp("diagnosed")
    return (folder, *doctor(folder, *RESNET, SIMULATED))


def test_a_resnet_is_diagnosed_without_data_or_weights(diagnosed: tuple[Path, Outcome, dict[str, Any]]) -> None:
    folder, outcome, result = diagnosed
    assert result["simulated"] and result["words"][0] == "This device is simulated; nothing was measured."
    assert all(sentence in outcome.out for sentence in result["words"])
    ratios = {name: found["ratio"]["median"] for name, found in result["slices"].items()}
    assert set(ratios) == {"half", "width", "depth", "both"}
    assert ratios["both"] <= min(ratios["width"], ratios["depth"]) and ratios["width"] <= ratios["half"] < 1
    assert [stair["kind"] for stair in result["stairs"]] == ["layer1", "layer2", "layer3", "layer4"]
    assert (folder / "run" / "doctor" / "staircase.png").stat().st_size > 1000
    manifest = json.loads((folder / "run" / "doctor" / "manifest.json").read_text())
    assert {"result.json", "staircase.png", "config.yaml", "environment.json"} == set(manifest["files"])
    assert sorted(path.name for path in (folder / "run").iterdir() if path.is_dir()) == ["doctor"]


@pytest.mark.parametrize("phase", ["prefill", "generate"])
def test_a_language_model_is_diagnosed(phase: str, tmp_path: Path) -> None:
    _, result = doctor(tmp_path, *LLAMA, SIMULATED, f"budget.phase={phase}")
    assert [(stair["kind"], stair["unit"]) for stair in result["stairs"]] == [("self_attn", "kv_head"), ("mlp", "ffn")]
    assert result["units"] == {"width": ["kv_head", "query_head", "ffn"], "depth": ["layer"]}
    assert result["slices"]["half"]["removed"] == pytest.approx(0.5)
    low, high = result["target"]["ratio"]
    assert 0 < low < high < 1
    assert result["target"]["ms"] == pytest.approx(
        [ratio * result["teacher"]["latency_ms"]["median"] for ratio in (low, high)]
    )
    assert f"in {phase} in eager mode" in " ".join(result["words"])


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        (("tflops=1000", "gbps=100000", "launch_us=1000"), "launch"),
        (("tflops=0.001", "gbps=10000", "launch_us=1"), "compute"),
        (("tflops=1000", "gbps=0.5", "launch_us=1"), "memory"),
    ],
)
def test_constructed_devices_are_recognised(device: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    overrides = [f"gpu.simulated.{setting}" for setting in device]
    _, result = doctor(tmp_path, *RESNET, SIMULATED, *overrides)
    assert result["bottleneck"]["kind"] == kind and f"this model is {kind}-bound" in " ".join(result["words"])
    saved = 1 - result["slices"]["half"]["ratio"]["median"]
    assert (saved < 0.005) if kind == "launch" else (saved > 0.1)
    bought = "nothing measurable" if kind == "launch" else f"{saved:.0%}"
    assert f"removing half of the channels buys {bought}" in " ".join(result["words"])


def test_what_was_found_is_shown_again_and_not_measured_again(
    diagnosed: tuple[Path, Outcome, dict[str, Any]],
) -> None:
    folder, _, result = diagnosed
    with mock.patch.object(SimulatedClock, "prepare", side_effect=AssertionError):
        second, _ = doctor(folder, *RESNET, SIMULATED)
    assert "already done" in second.out and all(sentence in second.out for sentence in result["words"])
    refused = hawada(*QUICK, f"output_dir={folder}", *RESNET[:-1], "budget.batch=8", SIMULATED)
    assert refused.code == 2 and "budget.batch=16" in refused.err


class Stepping(SimulatedClock):
    """Passes for a device's clock: its launches are cheap in a graph, and it has no compiler."""

    simulated = False

    def __init__(self, runtime: str = "eager") -> None:
        super().__init__(tflops=1.0, gbps=1e4, launch_us={"eager": 200.0, "cudagraph": 10.0}.get(runtime, 0.0))
        self.runtime = runtime

    def prepare(self, model: nn.Module, inputs: Inputs) -> Callable[[], float]:
        if self.runtime == "compile":
            raise RuntimeError("no compiler here;\nset runtime=eager")
        return super().prepare(model, inputs)


@pytest.fixture
def own_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    module = ModuleType("stepping_clock")
    module.Stepping = Stepping  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stepping_clock", module)
    yield "gpu.clock={_target_: stepping_clock.Stepping}"


def test_runtimes_are_compared_with_the_one_that_is_used(own_clock: str, tmp_path: Path) -> None:
    options = ("gpu=cpu", "measure.min_rounds=2", "measure.max_rounds=2", "doctor.runtimes=[cudagraph,compile,eager]")
    _, result = doctor(tmp_path, *RESNET, own_clock, *options)
    assert not result["simulated"] and result["bottleneck"]["kind"] == "launch"
    assert set(result["runtimes"]) == {"cudagraph", "compile"}
    graph = result["runtimes"]["cudagraph"]
    assert graph["against"] == "eager" and graph["ratio"]["median"] < 0.5
    assert graph["half"]["median"] < result["slices"]["half"]["ratio"]["median"]
    assert result["runtimes"]["compile"] == {"refused": "no compiler here; set runtime=eager"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("doctor.runtimes=[fast]", "doctor.runtimes: 'fast' is not one of eager, cudagraph, compile"),
        ("doctor.points=2", "doctor.points: 2 is not a whole number of at least 8"),
        ("doctor.max_seconds=0", "doctor.max_seconds: 0 is not a number above 0"),
    ],
)
def test_mistakes_are_told_before_any_work(override: str, message: str, tmp_path: Path) -> None:
    outcome = hawada(*QUICK, f"output_dir={tmp_path}", *RESNET, SIMULATED, override)
    assert outcome.code == 2 and message in outcome.err and len(outcome.err.splitlines()) == 1
    assert not list(tmp_path.rglob("manifest.json"))
