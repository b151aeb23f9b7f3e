"""Mistakes on the command line: exit code 2, one sentence that names the key and a remedy, and nothing written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from command import Outcome, hawada
from hydra.core.global_hydra import GlobalHydra

TINY = (
    "gpu.timing=simulated",
    "model.adapter.layers=[1,1,1,1]",
    "budget.batch=16",
    "profile.points=3",
    "profile.fitted_models=2",
    "profile.held_out_models=2",
)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, where `outputs/` would appear."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    GlobalHydra.instance().clear()


def assert_refused(outcome: Outcome, key: str, remedy: str) -> None:
    assert outcome.code == 2, outcome
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert key in lines[0]
    assert re.search(remedy, lines[0]), lines[0]
    assert "Traceback" not in outcome.out + outcome.err


MISTAKES = [
    # the command, the key that the sentence names, the remedy that it gives
    (["kd.temprature=1"], "kd.temprature", r"hawada --cfg job"),
    (["nonsense=1"], "nonsense", r"hawada --cfg job"),
    (["gpu=h900"], "gpu=h900", r"available are .*h100"),
    (["model=alexnet"], "model=alexnet", r"available are .*tiny_resnet"),
    (["stage=prune"], "stage=prune", r"available are .*pipeline"),
    (["budget.target_ratio=nan"], "budget.target_ratio", r"nan is not .*above 0.*at most 1.*set budget.target_ratio"),
    (["budget.target_ratio=0"], "budget.target_ratio", r"above 0.*at most 1.*set budget.target_ratio"),
    (["budget.target_ratio=2"], "budget.target_ratio", r"above 0.*at most 1.*set budget.target_ratio"),
    (["budget.target_ratio=-1"], "budget.target_ratio", r"above 0.*at most 1.*set budget.target_ratio"),
    (["budget.target_ratio=half"], "budget.target_ratio", r"half is not a number.*set budget.target_ratio"),
    (["budget.target_ms=-3"], "budget.target_ms", r"above 0.*set budget.target_ms"),
    (["latency_target_ms=inf"], "target_ms", r"inf is not .*above 0.*set .*target_ms"),
    (["budget.target_ms=3", "budget.target_ratio=0.5"], "budget.target_ratio", r"target_ms.*set one of the two"),
    (["latency_target_ms=3", "budget.target_ratio=0.5"], "budget.target_ratio", r"latency_target_ms.*one of the two"),
    (["lambda.lr=-0.1"], "lambda.lr", r"at least 0.*set lambda.lr"),
    (["kd.temperature=0"], "kd.temperature", r"above 0.*set kd.temperature"),
    (["kd.mse_weight=-1"], "kd.mse_weight", r"at least 0.*set kd.mse_weight"),
    (["penalties.floor=0.9", "penalties.ceiling=0.1"], "penalties.floor", r"penalties.ceiling.*lower it"),
    (["train.epochs=2.5"], "train.epochs", r"2.5 is not a whole number.*set train.epochs"),
    (["budget.batch=0"], "budget.batch", r"at least 1.*set budget.batch"),
    (["gpu.multiple.channel=0"], "gpu.multiple.channel", r"use 1 for no rounding"),
    (["gpu.timing=guessed"], "gpu.timing", r"measured, simulated.*set gpu.timing"),
    (["runtime=fast"], "runtime=fast", r"available are compile, cudagraph, eager"),
    (["runtime.mode=fast"], "runtime.mode", r"eager, cudagraph, compile; set runtime.mode"),
    (["export.widths=best"], "export.widths", r"allocation, gates.*set export.widths"),
    (["export.layout=tall"], "export.layout", r"uniform, heterogeneous.*set export.layout"),
    (["export.layout=uniform"], "export.layout", r"not a layout of ResNetAdapter; it has heterogeneous"),
    (["export.minimum.channel=-1"], "export.minimum.channel", r"at least 0.*set it"),
    (["budget.phase=think"], "budget.phase", r"forward, prefill.*set budget.phase"),
    (["budget.phase=decode"], "budget.phase", r"not a phase of ResNetAdapter; it has forward"),
    (["budget.prompt=0"], "budget.prompt", r"at least 1.*set budget.prompt"),
    (["budget.new_tokens=1"], "budget.new_tokens", r"at least 2.*set budget.new_tokens"),
    (["distill.chunk=0"], "distill.chunk", r"at least 1.*set distill.chunk"),
    (["distill.hidden_weight=-1"], "distill.hidden_weight", r"at least 0.*set distill.hidden_weight"),
    (
        ["teacher=llama"],
        "distill.teacher",
        r"takes text and tiny_resnet image data; choose a teacher that takes the same",
    ),
    (
        ["teacher=convnet", "distill.teacher.path=/no/such.safetensors"],
        "distill.teacher.path",
        r"/no/such.safetensors is neither a file of weights nor a folder that a run saved",
    ),
    (["schedule.batch_size=1"], "pretrain.batch_size", r"BatchNorm .* 1 image at a time; set schedule.batch_size to 2"),
    (
        ["compute.mixed_precision=fp16"],
        "compute.mixed_precision",
        r"fp16 needs an NVIDIA GPU.*set compute.mixed_precision",
    ),
    (["model.adapter.num_classes=5"], "data: ", r"10 classes do not fit a model with 5; set the model's number of"),
    (["data=stdlib"], "data: ", r"not image data, which tiny_resnet takes"),
    (["data=cifar10"], "data.root", r"set data.root="),
    (["data=cifar10", "data.root=/no/such/folder"], "data.root", r"/no/such/folder does not exist; set data.root"),
    (["stage=export"], "stage=export", r"run stage=\w+ first, or stage=pipeline"),
    (["stage=evaluate"], "stage=evaluate", r"run stage=\w+ first, or stage=pipeline"),
]


@pytest.mark.parametrize(("arguments", "key", "remedy"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_a_mistake_is_one_sentence_with_the_key_and_a_remedy(
    arguments: list[str], key: str, remedy: str, elsewhere: Path
) -> None:
    given = {argument.partition("=")[0] for argument in arguments}
    outcome = hawada(*(preset for preset in TINY if preset.partition("=")[0] not in given), *arguments)
    assert_refused(outcome, key, remedy)
    assert contents(elsewhere) == {}


@pytest.mark.parametrize(
    ("name", "key"), [("groups.name=nothing*", "groups.name"), ("groups.kind=heads", "groups.kind")]
)
def test_a_group_filter_that_matches_nothing_lists_what_is_there(name: str, key: str, elsewhere: Path) -> None:
    outcome = hawada(*TINY, name)
    assert_refused(outcome, key, r"layer1\.0\.conv1 \(channel\).*change groups\.name or groups\.kind")
    assert contents(elsewhere) == {}


def test_another_teachers_weights_that_cannot_be_had_are_named(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(elsewhere / "nothing"))
    assert_refused(hawada(*TINY, "teacher=convnet"), "distill.teacher.weights", r"V2 is not .*set distill.teacher.path")
    without = hawada(*TINY, "teacher=convnet", "distill.teacher.weights=null")
    assert_refused(without, "distill.teacher", r"no weights and no path; set distill.teacher.path$")
    assert contents(elsewhere) == {}


def test_an_output_folder_that_cannot_be_is_refused(elsewhere: Path) -> None:
    (elsewhere / "file").write_text("mine")
    outcome = hawada(*TINY, "output_dir=file/below")
    assert_refused(outcome, "output_dir", r"cannot write to file/below.*set output_dir to a folder you may write")
    assert contents(elsewhere) == {str(elsewhere / "file"): b"mine"}


def test_results_of_another_configuration_are_refused_and_stay(elsewhere: Path) -> None:
    assert hawada(*TINY, "stage=profile").code == 0
    before = contents(elsewhere)
    for stage in ("profile", "pipeline"):
        outcome = hawada(*TINY, f"stage={stage}", "profile.points=2")
        assert_refused(outcome, "profile.points=3", r"choose another name=..., or set overwrite=true")
    assert contents(elsewhere) == before


def test_a_device_that_is_not_here_is_refused_before_torch_would_load(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hawada.core.latency.device.present_gpus", lambda: [])
    monkeypatch.setitem(sys.modules, "hawada.stages.pipeline", None)  # importing it, and so torch, would raise
    outcome = hawada("gpu=h100")
    assert_refused(outcome, "gpu=h100", r"not an H100 \(no NVIDIA GPU found\).*gpu=local.*gpu\.timing=simulated")
    assert contents(elsewhere) == {}


def test_another_device_than_the_one_that_is_here_is_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hawada.core.latency.device.present_gpus", lambda: ["NVIDIA A100-SXM4-80GB"])
    assert_refused(hawada("gpu=4090"), "gpu=rtx4090", r"NVIDIA A100-SXM4-80GB found.*gpu=local")
    assert contents(elsewhere) == {}


def test_finetuning_needs_no_particular_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hawada.core.latency.device.present_gpus", lambda: [])
    outcome = hawada("gpu=h100", "stage=finetune")
    assert_refused(outcome, "stage=finetune", r"run stage=\w+ first")  # it is the results that are missing, not the GPU


@pytest.mark.parametrize("gpu", ["local", "cpu"])
def test_cuda_graphs_without_cuda_are_refused_before_torch_would_load(
    gpu: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hawada.core.latency.device.present_gpus", lambda: [])
    monkeypatch.setitem(sys.modules, "hawada.stages.pipeline", None)  # importing it, and so torch, would raise
    outcome = hawada(f"gpu={gpu}", "runtime=cudagraph")
    assert_refused(outcome, "runtime=cudagraph", rf"gpu={gpu} has none here; set runtime=eager")
    assert contents(elsewhere) == {}


def test_a_gpu_may_be_named_by_its_number() -> None:
    outcome = hawada("gpu=4090", "--cfg", "job")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search(r"^gpu:\n  name: rtx4090$", outcome.out, re.MULTILINE)


def test_inspect_lists_the_groups_that_can_go(elsewhere: Path) -> None:
    outcome = hawada(*TINY, "stage=inspect")
    assert (outcome.code, outcome.err) == (0, "")
    for block in ("layer1.0", "layer2.0", "layer3.0", "layer4.0"):
        assert re.search(rf"{block}\.conv1 .*channel", outcome.out)
        assert re.search(rf"{block}\.branch .*branch", outcome.out)
    written = json.loads((elsewhere / "outputs" / "tiny_resnet-local" / "inspect" / "result.json").read_text())
    assert {group["name"] for group in written["groups"]} >= {"layer1.0.conv1", "layer1.0.branch"}
    assert 0 < written["half"]["params"] < 1 and 0 < written["half"]["macs"] < 1
    reasons = {layer["module"]: layer["reason"] for layer in written["kept_whole"]}
    assert reasons["fc"] == "are outputs of the model" and reasons["conv1"] == "residual blocks add into"
    assert re.search(r"Conv2d layers keep .* channels, which residual blocks add into; set model", outcome.out)
    assert hawada(*TINY, "stage=inspect", "model.adapter.stream=true").code == 0  # another look replaces it


def test_inspect_shows_only_the_groups_that_pass_the_filter() -> None:
    outcome = hawada(*TINY, "stage=inspect", "groups.name=layer2.*", "groups.kind=channel")
    assert outcome.code == 0
    assert "layer2.0.conv1" in outcome.out
    assert "layer1.0.conv1" not in outcome.out and "layer2.0.branch" not in outcome.out


@pytest.mark.parametrize(
    ("arguments", "shown"), [(["--help"], "gpu: a100, cpu, h100"), (["--cfg", "job"], "latency_target_ms: null")]
)
def test_help_and_configuration_are_shown_without_loading_torch(
    arguments: list[str], shown: str, elsewhere: Path
) -> None:
    script = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr));"
    script += "from hawada.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "False\n")
    assert shown in done.stdout
    assert contents(elsewhere) == {}


@pytest.mark.parametrize(
    "command",
    [[str(Path(sys.executable).parent / "hawada")], [sys.executable, "-m", "hawada"]],
    ids=["script", "module"],
)
def test_the_real_command_refuses_in_one_line_and_with_exit_code_2(command: list[str], elsewhere: Path) -> None:
    done = subprocess.run([*command, "budget.target_ratio=2"], capture_output=True, text=True)
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), "budget.target_ratio", "set budget.target_ratio")
    assert contents(elsewhere) == {}
