"""The whole command on a simulated device, from a teacher to a verdict: what it writes, resumes, repeats, sweeps."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from command import Outcome, hawada
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

import hawada as package
from hawada.core import files as core_files
from hawada.core.files import sha256
from hawada.core.finetune import Finetuner
from hawada.core.train import LagrangeTrainer
from hawada.core.verdict import Verdict
from hawada.experiment.results import EvaluateResult, FinalResult, from_json, to_json
from hawada.stages.pipeline import can_be_verified_again
from hawada.workspace import ModelStopwatch, Verification

NAME = "tiny_resnet-local"
TINY = [
    "gpu.timing=simulated",
    "runtime.threads=1",  # threads that wait for each other stand still on a busy machine
    "model.adapter.layers=[1,1,1,1]",
    "model.adapter.image_size=16",
    "data.image_size=16",
    "data.samples=128",
    "data.test_samples=100",
    "schedule.pretrain=2",
    "schedule.train=2",
    "schedule.finetune=1",
    "budget.batch=16",
    "profile.points=3",
    "profile.fitted_models=2",
    "profile.held_out_models=2",
    "finetune.recalibration_samples=32",
    "calibration.samples=32",
    "export.points=2",
]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def times(folder: Path) -> dict[str, int]:
    """When each file below a folder was last written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def folders(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()}


@dataclass(frozen=True)
class Finished:
    """A finished pipeline."""

    outcome: Outcome
    output_dir: Path
    hashed: Counter[str]

    @property
    def root(self) -> Path:
        return self.output_dir / NAME

    @property
    def result(self) -> dict[str, Any]:
        return read(self.root / "result.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    output_dir = tmp_path_factory.mktemp("finished")
    with counted_checksums() as hashed:
        return Finished(hawada(*TINY, f"output_dir={output_dir}"), output_dir, hashed)


@contextmanager
def counted_checksums() -> Iterator[Counter[str]]:
    """How often each file was hashed, by its name, size, inode and time of change."""
    counts: Counter[str] = Counter()
    original = hashlib.file_digest

    def counting(file: Any, algorithm: str) -> Any:
        found = os.fstat(file.fileno())
        counts[f"{file.name} {found.st_size} {found.st_ino} {found.st_mtime_ns}"] += 1
        return original(file, algorithm)

    with mock.patch("hashlib.file_digest", counting):
        yield counts


@pytest.fixture
def profiled(finished: Finished, tmp_path: Path) -> Path:
    """An output directory in which only the profile and the teacher are there."""
    for stage in ("profile", "pretrain"):
        shutil.copytree(finished.root / stage, tmp_path / "out" / NAME / stage)
    return tmp_path / "out"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """The tiny settings as an overlay, so that a multirun's command line holds only what it sweeps."""
    path = tmp_path / "conf" / "recipe" / "tiny_resnet_local.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.from_dotlist(TINY)))
    return f"hydra.searchpath=[file://{tmp_path / 'conf'}]"


def test_the_pipeline_succeeds_and_says_how_to_use_the_result(finished: Finished) -> None:
    assert (finished.outcome.code, finished.outcome.err) == (0, "")
    assert f"hawada.load('{finished.result['slim']['path']}')" in finished.outcome.out


INTERVAL = {"median", "low", "high"}
MODEL = {"latency_ms", "params", "macs", "accuracy", "path"}


def test_a_narrower_stream_goes_all_the_way(tmp_path: Path, reload_here: None) -> None:
    """Gates on the streams alone: whatever time is saved is saved there, and the slim model loads."""
    presets = [preset for preset in TINY if not preset.startswith("profile.points")]
    narrow = ("profile.points=2", "model.adapter.stream=true", "groups.kind=stream")
    done = hawada(*presets, *narrow, f"output_dir={tmp_path}")
    assert (done.code, done.err) == (0, "")
    result = read(tmp_path / NAME / "result.json")
    assert result["verdict"] == "simulated" and result["latency_ratio"]["median"] <= 0.6
    equivalence = result["equivalence"]
    assert equivalence["max_abs_diff"] <= 1e-4 * equivalence["max_abs_logit"]
    slim = package.load(result["slim"]["path"])
    widths = [slim.bn1.num_features, *(slim.get_submodule(f"layer{stage}.0.bn2").num_features for stage in (2, 3, 4))]
    assert all(width <= full for width, full in zip(widths, (64, 128, 256, 512), strict=True))
    assert sum(widths) < 960 and slim.fc.in_features == widths[-1]
    assert slim.layer1[0].conv1.out_channels == 64  # inner channels had no gates


def test_the_result_has_every_promised_key(finished: Finished) -> None:
    result = finished.result
    promised = {"verdict", "target_ms", "latency_ratio", "teacher", "slim", "agreement", "proxy", "equivalence"}
    assert promised | {"environment", "metric", "phases"} <= set(result)
    assert set(result["latency_ratio"]) >= INTERVAL
    assert to_json(from_json(FinalResult, result, place="result.json", remedy="")) == result
    assert result["metric"] == "accuracy"
    assert set(result["phases"]) == {"forward"}
    assert all(set(figure) >= INTERVAL for figure in result["phases"]["forward"].values())
    assert {"mape", "kendall_tau", "samples"} <= set(result["proxy"])
    assert {"max_abs_diff", "max_abs_logit"} <= set(result["equivalence"])
    for name in ("teacher", "slim"):
        assert set(result[name]) >= MODEL
        assert set(result[name]["latency_ms"]) >= INTERVAL
    assert result["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_result_is_simulated_on_target_and_consistent(finished: Finished) -> None:
    result = finished.result
    teacher, slim = result["teacher"], result["slim"]
    assert result["verdict"] == "simulated"
    assert result["target_ms"] == pytest.approx(0.6 * teacher["latency_ms"]["median"])
    assert 0.5 * result["target_ms"] < slim["latency_ms"]["high"] <= result["target_ms"]
    ratio = slim["latency_ms"]["median"] / teacher["latency_ms"]["median"]
    assert result["latency_ratio"]["median"] == pytest.approx(ratio)
    forward = {"teacher_ms": teacher["latency_ms"], "slim_ms": slim["latency_ms"], "ratio": result["latency_ratio"]}
    for name, figure in result["phases"]["forward"].items():
        assert figure["median"] == forward[name]["median"]
    assert slim["params"] < teacher["params"] and slim["macs"] < teacher["macs"]
    assert result["proxy"]["samples"] == 2
    assert result["equivalence"]["max_abs_diff"] <= 1e-5 * result["equivalence"]["max_abs_logit"]
    pretrained = read(finished.root / "pretrain" / "result.json")["accuracy"]
    figures = (pretrained, teacher["accuracy"], slim["accuracy"], result["agreement"])
    assert all(0 <= figure <= 1 for figure in figures) and pretrained == teacher["accuracy"]


def test_every_stage_leaves_a_manifest_that_fits_its_files(finished: Finished) -> None:
    stages = {"profile", "pretrain", "train", "export", "finetune", "evaluate"}
    assert folders(finished.root) == stages
    for stage in stages:
        files = read(finished.root / stage / "manifest.json")["files"]
        assert {"config.yaml", "result.json"} <= set(files)
        assert {name: sha256(finished.root / stage / name) for name in files} == files


def test_no_file_is_hashed_twice_unless_it_changed(finished: Finished) -> None:
    """A whole pipeline, and then the same command again; it finds everything hashed in this process already."""
    assert len(finished.hashed) > 20 and set(finished.hashed.values()) == {1}
    with counted_checksums() as again:
        assert hawada(*TINY, f"output_dir={finished.output_dir}").code == 0
    assert not again
    core_files._digests.clear()  # as a new process has none
    with counted_checksums() as afresh:
        assert hawada(*TINY, f"output_dir={finished.output_dir}").code == 0
    assert set(afresh.values()) == {1}


@pytest.mark.parametrize("name", ["teacher", "slim"])
def test_a_saved_model_is_a_plain_module_in_eval_mode(name: str, finished: Finished) -> None:
    model = package.load(finished.result[name]["path"])
    assert not any(module.training for module in model.modules())
    assert {type(module).__module__.partition(".")[0] for module in model.modules()} <= {"torch", "torchvision"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert sum(parameter.numel() for parameter in model.parameters()) == finished.result[name]["params"]
    with torch.no_grad():
        assert model(torch.randn(3, 3, 16, 16)).shape == (3, 10)


def test_the_slim_model_has_the_widths_that_were_chosen(finished: Finished) -> None:
    keep = read(finished.root / "export" / "keep.json")
    slim = package.load(finished.result["slim"]["path"])
    convs = {name: kept for name, kept in keep.items() if name.endswith("conv1") and kept}
    assert convs and any(len(kept) < 512 for kept in convs.values())
    for name, kept in convs.items():
        assert slim.get_submodule(name).out_channels == len(kept)
    for name, kept in keep.items():
        if name.endswith("branch") and not kept:
            assert not hasattr(slim.get_submodule(name.removesuffix(".branch")), "conv1")


def test_the_same_command_resumes_and_touches_nothing(finished: Finished) -> None:
    before = times(finished.root)
    again = hawada(*TINY, f"output_dir={finished.output_dir}")
    assert again.code == 0
    assert again.out.count("already done") == 6
    after = times(finished.root)
    summary = str(finished.root / "result.json")  # written anew from the stages' results
    assert {**after, summary: 0} == {**before, summary: 0}
    assert read(finished.root / "result.json") == read(finished.root / "evaluate" / "result.json")


def test_an_interrupted_pipeline_goes_on_where_it_stopped(finished: Finished, tmp_path: Path, no_reload: None) -> None:
    root = tmp_path / NAME
    shutil.copytree(finished.root, root)
    (root / "finetune" / "manifest.json").unlink()  # written last, so its absence is an interruption
    before = times(root)
    again = hawada(*TINY, f"output_dir={tmp_path}")
    assert (again.code, again.out.count("already done")) == (0, 4)
    rewritten = {
        Path(path).relative_to(root).parts[0] for path, when in times(root).items() if when != before.get(path)
    }
    assert rewritten == {"finetune", "evaluate", "result.json"}


ARTEFACTS = ("train/gates.safetensors", "export/keep.json", "finetune/slim/model.safetensors")


@pytest.mark.skipif(torch.cuda.is_available(), reason="only training on the CPU promises to be bit-identical")
def test_the_same_seed_gives_the_same_bits_stage_by_stage_or_at_once(finished: Finished, tmp_path: Path) -> None:
    for stage in ("profile", "pretrain", "train", "export", "finetune"):
        outcome = hawada(*TINY, f"output_dir={tmp_path}", f"stage={stage}")
        assert outcome.code == 0, outcome.err
    for artefact in ARTEFACTS:
        assert (tmp_path / NAME / artefact).read_bytes() == (finished.root / artefact).read_bytes(), artefact


def test_another_seed_gives_another_result(finished: Finished, tmp_path: Path, no_reload: None) -> None:
    done = hawada(*TINY, f"output_dir={tmp_path}", "seed=1")
    assert done.code == 0, done.err
    other = tmp_path / NAME
    for artefact in ("train/gates.safetensors", "finetune/slim/model.safetensors"):
        assert (other / artefact).read_bytes() != (finished.root / artefact).read_bytes(), artefact


def test_another_teacher_gives_the_answers(finished: Finished, profiled: Path, tmp_path: Path) -> None:
    """The same model in another place changes nothing; one that knows nothing changes every gate."""
    folder = finished.root / "pretrain" / "teacher"
    wrong = package.load(folder).state_dict() | {"fc.weight": torch.zeros(10, 512)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    spec = "_target_: hawada.adapters.torchvision.resnet.ResNetAdapter, arch: basic, layers: [1, 1, 1, 1]"
    gates = []
    for path in (folder, tmp_path / "wrong.safetensors"):
        teacher = f"distill.teacher={{{spec}, num_classes: 10, image_size: 16, path: {path}}}"
        done = hawada(*TINY, f"output_dir={profiled}", "stage=train", "overwrite=true", teacher)
        assert (done.code, done.err) == (0, "")
        gates.append((profiled / NAME / "train" / "gates.safetensors").read_bytes())
    same = (finished.root / "train" / "gates.safetensors").read_bytes()
    assert gates[0] == same and gates[1] != same
    fewer = f"distill.teacher={{{spec}, num_classes: 7, image_size: 16, path: {folder}}}"
    refused = hawada(*TINY, f"output_dir={profiled}", "stage=train", "overwrite=true", fewer)
    assert refused.code == 2 and "distill.teacher: it knows 7 classes and tiny_resnet 10; choose one" in refused.err


def test_models_are_trained_with_channels_last_where_wanted_and_timed_as_saved(
    profiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts: list[tuple[str, bool]] = []

    def spy(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def spied(self: Any, *arguments: Any, **options: Any) -> Any:
            models = [self.gated, self.teacher] if owner is LagrangeTrainer else arguments
            weights = [p for m in models if isinstance(m, nn.Module) for p in m.parameters() if p.dim() == 4]
            layouts.append((name, all(weight.is_contiguous() for weight in weights)))
            return original(self, *arguments, **options)

        monkeypatch.setattr(owner, name, spied)

    spy(LagrangeTrainer, "fit")
    spy(Finetuner, "fit")
    spy(ModelStopwatch, "compare")
    for stage in ("pretrain", "train", "export", "finetune"):
        given = (f"output_dir={profiled}", f"stage={stage}", "calibration.samples=0", "overwrite=true")
        outcome = hawada(*TINY, *given, "compute.channels_last=true", "train.probe_every=1")
        assert outcome.code == 0, outcome.err
    assert layouts.count(("fit", False)) == 3 and ("fit", True) not in layouts
    assert ("compare", True) in layouts and ("compare", False) not in layouts


@pytest.mark.parametrize("stage", ["pipeline", "train"])
def test_a_target_that_the_teacher_meets_trains_nothing(stage: str, profiled: Path) -> None:
    outcome = hawada(*TINY, f"output_dir={profiled}", f"stage={stage}", "latency_target_ms=1000")
    assert outcome.code == 0, outcome.err
    assert "already_met" in outcome.out and "1000.000 ms" in outcome.out
    assert not (profiled / NAME / "train" / "gates.safetensors").exists()
    assert not (profiled / NAME / "export").exists()
    if stage == "pipeline":
        assert read(profiled / NAME / "result.json")["verdict"] == "already_met"


def test_a_target_that_nothing_meets_names_the_fastest_that_is_possible(finished: Finished, profiled: Path) -> None:
    outcome = hawada(*TINY, f"output_dir={profiled}", "budget.target_ms=1e-4")
    fastest_ms = read(finished.root / "profile" / "result.json")["fastest_ms"]
    assert outcome.code == 1
    assert f"the fastest is {fastest_ms:.3f} ms" in " ".join(outcome.out.split())
    result = read(profiled / NAME / "result.json")
    assert result["verdict"] == "infeasible" and "the fastest is" in result["reason"]
    assert not (profiled / NAME / "train").exists() and not (profiled / NAME / "export").exists()


def test_a_multirun_has_a_directory_per_job_and_shares_what_does_not_differ(
    profiled: Path, recipe: str, no_reload: None
) -> None:
    before = times(profiled)
    swept = ("budget.target_ratio=0.8,0.6", "lambda.lr=0.01,0.1")
    shorter = ("calibration.samples=0", "schedule.train=1", "schedule.finetune=0")
    outcome = hawada("-m", recipe, f"output_dir={profiled}", *shorter, *swept)
    assert outcome.code == 0, outcome.err
    jobs = {(ratio, lr): f"budget.target_ratio={ratio},lambda.lr={lr}" for ratio in (0.8, 0.6) for lr in (0.01, 0.1)}
    assert folders(profiled / NAME) == {"profile", "pretrain", *jobs.values()}
    assert {path: when for path, when in times(profiled).items() if path in before} == before  # not done again
    gates = set()
    for (ratio, _), name in jobs.items():
        assert folders(profiled / NAME / name) == {"train", "export", "finetune", "evaluate"}
        result = read(profiled / NAME / name / "result.json")
        assert result["target_ratio"] == ratio
        assert 0.8 * ratio < result["latency_ratio"]["median"] <= ratio
        gates.add((profiled / NAME / name / "train" / "gates.safetensors").read_bytes())
    assert len(gates) == 4  # every job trained its own
    assert "4 jobs" in outcome.out
    rows = [[cell.strip() for cell in line.split("│")] for line in outcome.out.splitlines() if "│ simulated" in line]
    assert [row[1:4] for row in rows] == [[str(ratio), str(lr), "simulated"] for ratio, lr in jobs]


def test_a_job_that_fails_does_not_stop_the_others(profiled: Path, recipe: str) -> None:
    outcome = hawada("-m", recipe, f"output_dir={profiled}", "stage=train", "kd.temperature=0,2", "lambda.lr=0.01,0.1")
    assert outcome.code != 0
    assert outcome.err.splitlines()[-1].startswith("hawada: kd.temperature: 0 is not")
    assert "Traceback" not in outcome.err
    trained = {path.parents[1].name for path in profiled.rglob("gates.safetensors")}
    assert trained == {f"kd.temperature=2,lambda.lr={rate}" for rate in ("0.01", "0.1")}
    assert "4 jobs" in outcome.out
    assert outcome.out.count("failed") >= 2


SWEEPS = ["latency_target_ms=1.4,1.2", "schedule.train=1,2", "train=gates,two_phase", "train.importance.samples=0,64"]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_key_that_training_depends_on_can_be_swept(sweep: str, profiled: Path, recipe: str) -> None:
    outcome = hawada("-m", recipe, f"output_dir={profiled}", "stage=train", sweep)
    assert outcome.code == 0, outcome.err
    gates = [path.read_bytes() for path in profiled.rglob("gates.safetensors")]
    assert len(set(gates)) == 2


def test_fixed_overrides_do_not_stand_in_the_way_of_a_multirun(profiled: Path) -> None:
    """A directory's name may not exceed 255 characters; a command line may."""
    outcome = hawada("-m", *TINY, f"output_dir={profiled}", "stage=train", "gate=sigmoid,annealed")
    assert outcome.code == 0, outcome.err
    gates = [path.read_bytes() for path in profiled.rglob("gates.safetensors")]
    assert len(gates) == len(set(gates)) == 2


def test_without_a_target_a_fixed_lambda_traces_the_trade_off(profiled: Path, recipe: str, no_reload: None) -> None:
    fixed = ["budget.target_ratio=null", "lambda.lr=0", "train.gate_optimizer.lr=2.0", "calibration.samples=0"]
    outcome = hawada("-m", recipe, f"output_dir={profiled}", *fixed, "lambda.init=0.001,10")
    assert outcome.code == 0, outcome.err
    results = {}
    for path in (profiled / NAME).glob("*/result.json"):
        if "lambda.init" in path.parent.name:
            results[path.parent.name.partition("lambda.init=")[2].partition(",")[0]] = read(path)
    assert set(results) == {"0.001", "10"}
    assert all(result["target_ms"] is None and result["verdict"] == "unverified" for result in results.values())
    assert results["10"]["latency_ratio"]["median"] < results["0.001"]["latency_ratio"]["median"] <= 1


def test_a_measurement_without_a_verdict_fails_the_run_after_everything_is_saved(
    finished: Finished, tmp_path: Path, no_reload: None
) -> None:
    root = tmp_path / NAME
    shutil.copytree(finished.root, root)
    (root / "evaluate" / "manifest.json").unlink()

    def lose(watch: ModelStopwatch, *_: Any) -> Verification:
        earlier = watch.store.run.result("export").measured
        return Verification(replace(earlier, source="measured", noisy="device lost"), failed="device lost")

    with mock.patch("hawada.stages.evaluate.measure_for_verdict", lose):
        outcome = hawada(*TINY, f"output_dir={tmp_path}")
    assert outcome.code == 1 and outcome.err == ""
    result = read(root / "result.json")
    assert result["verdict"] == "unverified" and "device lost" in result["reason"]
    assert "device lost" in outcome.out
    assert result["slim"]["accuracy"] == finished.result["slim"]["accuracy"]
    assert Path(result["slim"]["path"], "README.md").is_file()
    assert "the same command measures again" in result["reason"] and "measure.max_seconds=36" in result["reason"]
    again = hawada(*TINY, f"output_dir={tmp_path}")
    assert (again.code, again.err, again.out.count("already done")) == (0, "", 5)
    assert read(root / "result.json")["verdict"] == "simulated"


def test_an_evaluation_that_measuring_again_cannot_change_is_finished(
    finished: Finished,
) -> None:
    """Without a target, or with figures of a table, another measurement gives no verdict either."""
    plain = read(finished.root / "evaluate" / "result.json")
    result: EvaluateResult = from_json(EvaluateResult, plain, place="result.json", remedy="")
    undecided = replace(result, verdict=Verdict.UNVERIFIED)
    measured = replace(result.measured, source="measured")
    assert not can_be_verified_again(replace(undecided, target_ratio=None, measured=measured))
    assert not can_be_verified_again(replace(undecided, measured=replace(result.measured, source="table")))
    assert can_be_verified_again(replace(undecided, measured=measured))
    assert not can_be_verified_again(replace(result, verdict=Verdict.MISSED, measured=measured))
