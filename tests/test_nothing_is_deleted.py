"""Whatever this program did not write is there afterwards, bytes unchanged, wherever it was planted."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from stage_results import example, final
from torch import nn

from hawada.adapters import save_model
from hawada.adapters.base import MANIFEST as MODEL_MANIFEST, WEIGHTS
from hawada.adapters.torchvision import ResNetAdapter
from hawada.config import conf_dir, register_resolvers
from hawada.core.files import is_signed, partial_path, sha256, signed, whole_name, write_json, write_text
from hawada.core.structure import keep_all
from hawada.experiment import PLANS, MetricsLog, Run
from hawada.interlingua.checkpoint import STATE_FILE, TENSORS_FILE, load_checkpoint, save_checkpoint

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
THEIRS = b"\x00 somebody's own bytes \xff"


@pytest.fixture(autouse=True)
def hydra_is_fresh() -> Iterator[None]:
    GlobalHydra.instance().clear()
    register_resolvers()
    yield
    GlobalHydra.instance().clear()


def make_run(root: Path, *overrides: str, overwrite: bool = False) -> Run:
    return Run(root, composed(overrides), overwrite=overwrite)


@cache
def composed(overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose("config", overrides=["gpu.timing=simulated", *overrides])


def plant(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(THEIRS)
    return path


def attempt(run: Run, stage: str = "export") -> Path:
    """An attempt that was broken off, with some of the stage's files."""
    with run.writing(stage) as folder:
        for name in PLANS[stage].writes[:4]:
            path = folder / name.replace("*", "x")
            path.parent.mkdir(exist_ok=True)
            path.write_text("own")
    return folder


def finish(run: Run, stage: str = "export") -> Path:
    folder = attempt(run, stage)
    run.finish(stage, example(stage))
    return folder


# A stage's folder


@pytest.mark.parametrize("name", ["notes.txt", "deep/er/notes.txt", "slim/notes.txt", "slim/.hidden", "manifest.json"])
@pytest.mark.parametrize("before", ["nothing", "attempt", "finished"])
@pytest.mark.parametrize("stage", ["export", "finetune"])
def test_a_stage_is_refused_by_the_name_of_a_file_that_is_not_its_own(
    stage: str, before: str, name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path, overwrite=True)
    {"nothing": lambda *_: None, "attempt": attempt, "finished": finish}[before](run, stage)
    theirs = plant(tmp_path / stage / name)
    again = make_run(tmp_path, "seed=1", overwrite=True)
    kept = {path: path.read_bytes() for path in (tmp_path / stage).rglob("*") if path.is_file()}
    message = rf"stage={stage}: .*was not written by this program.*; move it away, or choose another name="
    for act in (again.check, lambda stage: again.check_all([stage]), lambda stage: again.writing(stage).__enter__()):
        with pytest.raises(ValueError, match=message):
            act(stage)
    assert theirs.read_bytes() == THEIRS
    assert {path: path.read_bytes() for path in kept} == kept  # nothing was touched by the refusal


def test_files_of_a_plan_in_a_folder_that_no_stage_began_are_the_users(tmp_path: Path) -> None:
    theirs = [plant(tmp_path / "export" / name) for name in ("keep.json", "slim/model.safetensors", "config.yaml")]
    with pytest.raises(ValueError, match=r"config\.yaml was not written by this program"):
        make_run(tmp_path).check("export")
    assert all(path.read_bytes() == THEIRS for path in theirs)


@pytest.mark.parametrize("text", ["[]", "{}", '{"stage": "export"}', '{"stage": "train", "files": {"keep.json": ""}}'])
def test_a_manifest_of_something_else_gives_nothing_away(text: str, tmp_path: Path) -> None:
    theirs = plant(tmp_path / "export" / "keep.json")
    (tmp_path / "export" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"keep\.json was not written by this program"):
        make_run(tmp_path, overwrite=True).check("export")
    assert theirs.read_bytes() == THEIRS


def test_a_manifest_that_lists_files_outside_its_folder_reaches_none_of_them(tmp_path: Path) -> None:
    theirs = plant(tmp_path / "theirs.txt")
    run = make_run(tmp_path)
    path = finish(run) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] |= {"../theirs.txt": "", str(theirs): ""}
    path.write_text(json.dumps(manifest))
    with run.writing("export"):
        assert theirs.read_bytes() == THEIRS


def test_what_a_stage_wrote_is_replaced_and_an_empty_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "export" / "empty").mkdir(parents=True)
    for _ in range(2):
        for begin in (attempt, finish):
            folder = begin(make_run(tmp_path))
    with make_run(tmp_path).writing("export"):
        assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "empty"]


def test_files_beside_a_finished_stage_s_own_do_not_make_it_unfinished(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with run.writing("export") as folder:
        theirs = plant(folder / "slim" / "notes.txt")  # while the stage is at work
        run.finish("export", example("export"))
    plant(folder / "more.txt")
    assert run.is_finished("export") and "slim/notes.txt" not in run._manifest("export")["files"]
    theirs.unlink()
    assert make_run(tmp_path).is_finished("export")


@pytest.mark.parametrize("place", ["folder", "file", "directory", "own"])
@pytest.mark.parametrize("before", [attempt, finish])
def test_links_are_not_followed(place: str, before: Callable[[Run], Path], tmp_path: Path) -> None:
    theirs = plant(tmp_path / "elsewhere" / "keep.json")
    run = make_run(tmp_path / "run", overwrite=True)
    folder = tmp_path / "run" / "export"
    if place == "folder":
        folder.parent.mkdir()
        folder.symlink_to(theirs.parent)
    else:
        before(run)
        link = folder / {"file": "notes", "directory": "teacher", "own": "keep.json"}[place]
        link.unlink(missing_ok=True)
        link.symlink_to(theirs.parent if place == "directory" else theirs)
    again = make_run(tmp_path / "run", "seed=1", overwrite=True)
    with pytest.raises(ValueError, match=r"links are not followed, where a folder|was not written by this program"):
        again.check("export")
    with pytest.raises(ValueError, match=r"links are not followed, where a folder|was not written by this program"):
        again.writing("export").__enter__()
    assert theirs.read_bytes() == THEIRS


def test_a_file_in_place_of_a_stage_s_folder_is_refused(tmp_path: Path) -> None:
    theirs = plant(tmp_path / "export")
    with pytest.raises(ValueError, match="is a file, where a folder of this program's own was expected; move it away"):
        make_run(tmp_path).check("export")
    assert theirs.read_bytes() == THEIRS


def test_an_interrupted_removal_is_known_as_the_program_s_own(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    folder = finish(run)
    run.record([])
    unlink, removed = Path.unlink, []

    def stop(path: Path, missing_ok: bool = False) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, missing_ok=missing_ok)

    with mock.patch.object(Path, "unlink", stop), pytest.raises(KeyboardInterrupt), run.writing("export"):
        pytest.fail("the folder was handed out")
    assert removed and not make_run(tmp_path).check("export")
    with make_run(tmp_path).writing("export"):
        assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_what_was_measured_elsewhere_is_kept_until_it_is_measured_again(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    folder = finish(run)
    run.discard("export")
    assert not run.check("export") and make_run(tmp_path).check("export") is make_run(tmp_path).is_finished("export")
    theirs = plant(folder / "notes.txt")
    with pytest.raises(ValueError, match=r"notes\.txt was not written by this program"):
        run.discard("export")
    assert theirs.read_bytes() == THEIRS


def test_a_stage_that_will_be_stale_is_refused_before_the_first_one_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path, "model.pretrain=false")
    for stage in ("profile", "train", "export"):
        finish(run, stage)
    theirs = plant(tmp_path / "export" / "notes.txt")
    run.check_all(["profile", "train", "export"])
    run.discard("profile")
    with pytest.raises(ValueError, match=r"stage=export: .*notes\.txt was not written by this program"):
        run.check_all(["profile", "train", "export"])
    assert theirs.read_bytes() == THEIRS


# The experiment's folder


@pytest.mark.parametrize("content", [THEIRS, b"{}", b"[1]", b'{"verdict": "met"}'])
def test_a_result_of_something_else_is_not_replaced(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(content)
    run = make_run(tmp_path)
    result = final()
    for act in (run.check_writable, lambda: run.conclude(result)):
        with pytest.raises(ValueError, match=r"result\.json was not written by this program.*; move it away"):
            act()
    assert (tmp_path / "result.json").read_bytes() == content
    (tmp_path / "result.json").unlink()
    for _ in range(2):
        run.conclude(result)
        run.check_writable()


def test_a_lock_of_something_else_is_neither_emptied_nor_removed(tmp_path: Path) -> None:
    theirs = plant(tmp_path / ".lock")
    with pytest.raises(ValueError, match=r"\.lock was not written by this program, whose locks are empty files; move"):
        make_run(tmp_path).locked().__enter__()
    assert theirs.read_bytes() == THEIRS


@pytest.mark.parametrize("write", [lambda path: write_text(path, "own"), lambda path: write_json(path, {})])
def test_a_file_is_written_past_whatever_lies_beside_it(write: Callable[[Path], None], tmp_path: Path) -> None:
    theirs = [plant(tmp_path / name) for name in (".a.json.partial", "a.json.partial", ".a.json.tmp")]
    for _ in range(2):
        write(tmp_path / "a.json")
    assert all(path.read_bytes() == THEIRS for path in theirs)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *(path.name for path in theirs)}


def test_a_log_that_is_cut_leaves_what_lies_beside_it(tmp_path: Path) -> None:
    theirs = plant(tmp_path / ".metrics.jsonl.partial")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(3):
        log.write({"step": step})
    log.keep(lambda record: record["step"] < 2)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2 and theirs.read_bytes() == THEIRS


def test_names_of_partial_files_are_new_and_lead_back(tmp_path: Path) -> None:
    names = {partial_path(tmp_path / "a.json").name for _ in range(100)}
    assert len(names) == 100 and {whole_name(name) for name in names} == {"a.json"}
    assert whole_name(".a.json.partial") == ".a.json.partial"


def test_a_card_is_its_own_until_somebody_edits_it(tmp_path: Path) -> None:
    from hawada.stages.evaluate import write_card

    path = tmp_path / "README.md"
    write_card(path, signed("# One\n"))
    write_card(path, signed("# Two\n"))
    assert path.read_text().startswith("# Two") and is_signed(path)
    edited = path.read_text().replace("Two", "Mine")
    path.write_text(edited)
    write_card(path, signed("# Three\n"))
    assert path.read_text() == edited and not is_signed(path)
    plant(path)
    write_card(path, signed("# Four\n"))
    assert path.read_bytes() == THEIRS


def test_an_edited_card_keeps_finetuning_from_being_redone_and_an_own_one_does_not(tmp_path: Path) -> None:
    card = finish(make_run(tmp_path), "finetune") / "slim" / "README.md"
    card.write_text(signed("# One\n"))
    again = make_run(tmp_path, "seed=1", overwrite=True)
    assert not again.check("finetune")
    plant(card)
    with pytest.raises(ValueError, match=r"README\.md was not written by this program"):
        again.check("finetune")
    assert card.read_bytes() == THEIRS


# Saved models


def save(path: Path) -> list[Path]:
    options = {"arch": "basic", "layers": [1, 1, 1, 1], "num_classes": 2, "image_size": 16}
    adapter = ResNetAdapter(**options)
    model = adapter.skeleton()
    groups = adapter.groups(model)
    spec = {"_target_": "hawada.adapters.torchvision.resnet.ResNetAdapter", **options}
    keep = keep_all(groups)
    return save_model(path, model, adapter=adapter, adapter_spec=spec, teacher=model, groups=groups, keep=keep)


def test_saving_a_model_leaves_what_is_not_a_model_s(tmp_path: Path) -> None:
    names = ("notes.txt", "model-00001-of-00002.safetensors", "own.safetensors", "deep/er")
    theirs = [plant(tmp_path / "slim" / name) for name in names]
    for _ in range(2):
        assert {path.name for path in save(tmp_path / "slim")} == {WEIGHTS, MODEL_MANIFEST}
    assert all(path.read_bytes() == THEIRS for path in theirs)
    assert set(json.loads((tmp_path / "slim" / MODEL_MANIFEST).read_text())["sha256"]) == {WEIGHTS}
    assert {path.name for path in (tmp_path / "slim").iterdir()} == {
        *(name.partition("/")[0] for name in names),
        WEIGHTS,
        MODEL_MANIFEST,
    }


@pytest.mark.parametrize("name", [WEIGHTS, MODEL_MANIFEST])
@pytest.mark.parametrize("link", [False, True])
def test_saving_a_model_does_not_replace_a_file_of_somebody_else(link: bool, name: str, tmp_path: Path) -> None:
    theirs = plant(tmp_path / "elsewhere" if link else tmp_path / "slim" / name)
    if link:
        save(tmp_path / "slim")
        (tmp_path / "slim" / name).unlink()
        (tmp_path / "slim" / name).symlink_to(theirs)
    before = sorted(path.name for path in (tmp_path / "slim").iterdir())
    with pytest.raises(
        ValueError,
        match=r"(hawada.json|model.safetensors) was there before and is no saved model's.*; move it away, or save",
    ):
        save(tmp_path / "slim")
    assert theirs.read_bytes() == THEIRS and sorted(path.name for path in (tmp_path / "slim").iterdir()) == before


# Checkpoints of a training


def checkpoint(folder: Path, step: int) -> None:
    module = nn.Linear(2, 2)
    save_checkpoint(folder, module, torch.optim.SGD(module.parameters(), lr=0.1), {"step": step})


def test_a_checkpoint_is_replaced_around_what_is_not_its_own(tmp_path: Path) -> None:
    names = ("last/notes.txt", "last/deep/er", ".last.partial/state.json", ".last.old/notes", "lasting")
    theirs = [plant(tmp_path / name) for name in names]
    for step in range(3):
        checkpoint(tmp_path / "last", step)
        state = load_checkpoint(tmp_path / "last", nn.Linear(2, 2), None)
        assert state == {"step": step} and all(path.read_bytes() == THEIRS for path in theirs)
    assert {path.name for path in (tmp_path / "last").iterdir()} == {"notes.txt", "deep", STATE_FILE, TENSORS_FILE}
    assert {path.name for path in tmp_path.iterdir()} == {"last", ".last.partial", ".last.old", "lasting"}


@pytest.mark.parametrize("renames", [0, 1])
def test_a_checkpoint_whose_saving_was_interrupted_is_put_in_order(renames: int, tmp_path: Path) -> None:
    folder = tmp_path / "last"
    checkpoint(folder, 1)
    theirs = plant(folder / "notes.txt")
    replace, done = os.replace, []

    def stop(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(source)
        replace(source, target)

    with mock.patch("os.replace", stop), pytest.raises(KeyboardInterrupt):
        checkpoint(folder, 2)
    assert load_checkpoint(folder, nn.Linear(2, 2), None) == {"step": 1}
    assert theirs.read_bytes() == THEIRS and [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_checkpoint_s_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    theirs = plant(tmp_path / "elsewhere" / STATE_FILE)
    (tmp_path / "last").symlink_to(theirs.parent)
    for act in (checkpoint, lambda folder, _: load_checkpoint(folder, nn.Linear(2, 2), None)):
        with pytest.raises(ValueError, match="last is a link, where a checkpoint's own folder was expected"):
            act(tmp_path / "last", 1)
    assert theirs.read_bytes() == THEIRS


# A training that was broken off


def begin(run: Run) -> Path:
    with run.resuming("interlingua") as folder:
        checkpoint(folder / "last", 7)
    return folder


def interlingua(root: Path, *overrides: str, overwrite: bool = False) -> Run:
    return make_run(root, "stage=interlingua", "data=recall", *overrides, overwrite=overwrite)


def test_an_unfinished_training_is_not_cleared_when_a_key_changes(tmp_path: Path) -> None:
    first = interlingua(tmp_path, "interlingua.latent_len=2")
    tensors = begin(first) / "last" / TENSORS_FILE
    before = tensors.read_bytes()
    other = interlingua(tmp_path, "interlingua.latent_len=4")
    message = (
        r"interlingua holds an unfinished stage=interlingua that was begun with interlingua\.latent_len=2 "
        r"\(now interlingua\.latent_len=4\); use the same values, choose another name=\.\.\., or set overwrite=true"
    )
    for act in (lambda: other.check("interlingua"), lambda: begin(other)):
        with pytest.raises(ValueError, match=message):
            act()
    assert tensors.read_bytes() == before
    again = interlingua(tmp_path, "interlingua.latent_len=2")
    plant(tmp_path / "interlingua" / "notes.txt")  # does not stand in the way of going on
    assert not again.check("interlingua")
    with again.resuming("interlingua") as folder:
        assert (folder / "last" / TENSORS_FILE).read_bytes() == before
    with pytest.raises(ValueError, match=r"notes\.txt was not written by this program"):
        interlingua(tmp_path, "interlingua.latent_len=4", overwrite=True).check("interlingua")
    (tmp_path / "interlingua" / "notes.txt").unlink()
    replacing = interlingua(tmp_path, "interlingua.latent_len=4", overwrite=True)
    assert not replacing.check("interlingua")
    with replacing.resuming("interlingua") as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["attempt.json", "config.yaml"]


def test_an_unfinished_training_from_other_models_is_not_cleared(tmp_path: Path) -> None:
    run = interlingua(tmp_path)
    finish(run, "interlingua-llms")
    tensors = begin(run) / "last" / TENSORS_FILE
    before = tensors.read_bytes()
    path = tmp_path / "interlingua-llms" / "manifest.json"
    path.write_text(path.read_text().replace("finished", "finished "))
    with pytest.raises(ValueError, match=r"was begun from another result of stage=interlingua-llms; use the same"):
        interlingua(tmp_path).check("interlingua")
    assert tensors.read_bytes() == before


# Checksums


def test_a_file_is_hashed_once_and_again_when_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"one")
    import hashlib

    with mock.patch("hashlib.file_digest", wraps=hashlib.file_digest) as hashed:
        first = [sha256(path), sha256(path)]
        assert hashed.call_count == 1 and len(set(first)) == 1
        times = path.stat()
        path.write_bytes(b"two")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert sha256(path) == hashlib.sha256(b"two").hexdigest() and hashed.call_count == 2


@pytest.mark.parametrize("same_time", [False, True])
def test_a_stage_with_a_damaged_file_of_the_same_size_is_not_finished(same_time: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = finish(run) / "keep.json"
    assert run.is_finished("export") and run.is_finished("export")
    times = path.stat()
    path.write_text("0wn")
    if same_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not run.is_finished("export") and not make_run(tmp_path).is_finished("export")


# Benchmarks


def test_a_benchmark_copies_models_to_where_nothing_is_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("interlingua_recall", BENCHMARKS / "interlingua_recall.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    plant(tmp_path / "models" / "llama" / WEIGHTS)
    theirs = plant(tmp_path / "job" / "notes.txt")
    script.copy_new(tmp_path / "models", tmp_path / "job" / "models")
    assert (tmp_path / "job" / "models" / "llama" / WEIGHTS).read_bytes() == THEIRS
    other = plant(tmp_path / "other" / "llama" / WEIGHTS)
    other.write_bytes(THEIRS * 2)
    with pytest.raises(RuntimeError, match="other exists and is not what this benchmark copied; give another --root"):
        script.copy_new(tmp_path / "models", tmp_path / "other")
    assert other.read_bytes() == THEIRS * 2 and theirs.read_bytes() == THEIRS
