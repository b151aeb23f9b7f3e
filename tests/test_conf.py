"""The configuration composes in every combination, and has the choices and defaults that users are promised."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from hawada.config import check_given, conf_dir, register_resolvers, validate
from hawada.experiment.plan import OF_GROUP

CONF = Path(conf_dir())
FILES = sorted(CONF.rglob("*.yaml"))
TRIPLE = ("model", "gpu", "stage")
GROUPS = {path.parent.name for path in FILES} - {CONF.name, "recipe", "sweep"}


def options(group: str) -> list[str]:
    """The choices of a config group: the names of its files."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def hydra_is_fresh() -> Iterator[None]:
    GlobalHydra.instance().clear()
    register_resolvers()
    yield
    GlobalHydra.instance().clear()


@contextmanager
def composer() -> Iterator[Any]:
    """Within the block, a function from overrides to the composed configuration."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: compose("config", overrides=list(overrides))


def composed(*overrides: str) -> DictConfig:
    with composer() as make:
        return make(*overrides)


def give_data_root(cfg: DictConfig, folder: Path) -> DictConfig:
    """Stands in for the one thing that a user must say: where the data lies."""
    if OmegaConf.is_missing(cfg.data, "root"):
        cfg.data.root = str(folder)
    return cfg


def every_two() -> list[tuple[str, str, str]]:
    """Triples in which any two choices of different groups meet: a Latin square, as all triples would be far more."""
    models, gpus, stages = map(options, TRIPLE)
    gpu_at_stage = [
        [gpus[(row + column) % len(gpus)] for column in range(len(stages))]
        for row in range(max(len(models), len(gpus)))
    ]
    return sorted(
        {
            (models[row % len(models)], gpu, stage)
            for row, line in enumerate(gpu_at_stage)
            for gpu, stage in zip(line, stages, strict=True)
        }
    )


@pytest.mark.parametrize(TRIPLE, every_two())
def test_any_two_of_model_gpu_and_stage_compose(model: str, gpu: str, stage: str, tmp_path: Path) -> None:
    cfg = give_data_root(composed(f"model={model}", f"gpu={gpu}", f"stage={stage}", "gpu.timing=simulated"), tmp_path)
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # every interpolation finds its target
    assert all(resolved[group] for group in TRIPLE)
    validate(cfg)
    check_given(cfg, resolved)
    name = "interlingua" if stage.startswith("interlingua") else f"{cfg.model.name}-{gpu}"
    assert (cfg.name, cfg.gpu.name) == (name, gpu)


def test_any_two_choices_are_among_those() -> None:
    for one, other in combinations(range(3), 2):
        met = {(row[one], row[other]) for row in every_two()}
        assert met == set(product(options(TRIPLE[one]), options(TRIPLE[other])))


OTHERS = [(group, name) for group in sorted(GROUPS - {*TRIPLE, "feature"}) for name in options(group)]


@pytest.mark.parametrize(("group", "option"), OTHERS)
def test_every_option_of_the_other_groups_composes(group: str, option: str, tmp_path: Path) -> None:
    cfg = give_data_root(composed(f"{group}={option}", "gpu.timing=simulated"), tmp_path)
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert OmegaConf.select(cfg, OF_GROUP.get(group, group)), f"{group}={option} composes to nothing"
    validate(cfg)
    check_given(cfg, resolved)


def test_features_of_the_interlingua_add_up() -> None:
    assert composed("stage=interlingua").interlingua.features == {}
    chosen = composed("stage=interlingua", f"feature=[{','.join(options('feature'))}]").interlingua.features
    assert sorted(chosen) == options("feature") and all("_target_" in node for node in chosen.values())


def test_the_groups_that_users_choose_from_are_there() -> None:
    assert {"model", "gpu", "stage", "data", "schedule", "train"} <= GROUPS
    assert {"tiny_resnet", "resnet"} <= set(options("model"))
    assert {"local", "cpu", "rtx4090", "h100", "h200", "a100"} <= set(options("gpu"))
    assert {"profile", "pretrain", "train", "export", "finetune", "evaluate", "pipeline"} <= set(options("stage"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_a_conf_file_is_short_and_first_says_when_to_choose_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines[0]) > 10
    assert len(lines) <= (64 if path.name == "config.yaml" else 30)


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` at any depth."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


@pytest.mark.parametrize(
    "target", sorted({name for path in FILES for name in targets(yaml.safe_load(path.read_text()))})
)
def test_every_target_can_be_imported(target: str) -> None:
    module, _, name = target.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


def test_everything_that_a_user_may_replace_is_a_target() -> None:
    cfg = composed()
    for node in ("model.adapter", "gate", "kd", "proxy", "gpu.clock", "gpu.simulated", "data"):
        assert "_target_" in OmegaConf.select(cfg, node), node
    for node in ("pretrain.trainer", "finetune.trainer", "train.gate_optimizer"):
        assert "_target_" in OmegaConf.select(cfg, node), node
    assert all("_target_" in node for node in cfg.penalty.values())


@pytest.mark.parametrize(("alias", "stage"), [("gate-train", "train"), ("export-search", "export")])
def test_a_stage_has_a_second_name(alias: str, stage: str) -> None:
    assert composed(f"stage={alias}").stage.name == stage


USER_KEYS = {
    "kd.temperature": 3.0,
    "kd.mse_weight": 0.25,
    "distill.chunk": 512,
    "distill.hidden_weight": 0.5,
    "export.layout": "uniform",
    "export.minimum.ffn": 64,
    "latency_target_ms": 20.0,
    "lambda.init": 2.0,
    "lambda.lr": 0.125,
    "penalties.l1": 0.5,
    "penalties.structured": 0.5,
    "penalties.floor": 0.1,
    "penalties.ceiling": 0.9,
    "budget.target_ms": 20.0,
    "budget.target_ratio": 0.5,
    "budget.phase": "decode",
    "budget.prompt": 64,
    "budget.new_tokens": 16,
}


@pytest.mark.parametrize("key", USER_KEYS)
def test_a_documented_key_can_be_set(key: str) -> None:
    cfg = composed(f"{key}={USER_KEYS[key]}")  # Hydra refuses a key that is not there
    assert OmegaConf.select(cfg, key) == USER_KEYS[key]


@pytest.mark.parametrize("model", ["resnet", "convnet", "vit", "llama"])
def test_a_pretrained_model_can_come_from_a_local_path(model: str) -> None:
    assert composed(f"model={model}", "model.path=/elsewhere").model.adapter.path == "/elsewhere"


@pytest.mark.parametrize("mode", ["eager", "cudagraph", "compile"])
def test_the_runtime_reaches_the_clock_of_every_gpu(mode: str) -> None:
    for gpu in options("gpu"):
        cfg = composed(f"runtime={mode}", f"gpu={gpu}", "runtime.threads=1", "compute.mixed_precision=bf16")
        assert cfg.gpu.clock.runtime == mode
        assert cfg.runtime == {"mode": mode, "threads": 1}
        assert cfg.compute == {"mixed_precision": "bf16", "channels_last": False}


def test_penalty_keys_reach_the_penalties() -> None:
    cfg = composed("penalties.l1=0.5", "penalties.structured=0.25", "penalties.floor=0.1", "penalties.ceiling=0.9")
    assert (cfg.penalty.l1.weight, cfg.penalty.structured.weight) == (0.5, 0.25)
    assert (cfg.penalty.bounds.floor, cfg.penalty.bounds.ceiling) == (0.1, 0.9)


@pytest.mark.parametrize("key", ["latency_target_ms", "budget.target_ms"])
def test_a_target_in_milliseconds_replaces_the_default_ratio(key: str) -> None:
    cfg = composed(f"{key}=20", "gpu.timing=simulated")
    assert cfg.budget.target_ms == 20
    assert cfg.budget.target_ratio is None
    validate(cfg)


def test_without_a_target_in_milliseconds_there_is_a_ratio() -> None:
    cfg = composed()
    assert cfg.budget.target_ms is None
    assert 0 < cfg.budget.target_ratio < 1


def recipe_folder(tmp_path: Path, name: str) -> str:
    """A search-path override for a folder that has one recipe."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / f"{name}.yaml").write_text(
        "# @package _global_\nkd: {temperature: 3.5}\ntrain: {epochs: 7}\n"
    )
    return f"hydra.searchpath=[file://{tmp_path}]"


def test_a_recipe_of_the_pair_is_laid_over_the_defaults(tmp_path: Path) -> None:
    search_path = recipe_folder(tmp_path, "tiny_resnet_h200")
    cfg = composed(search_path, "gpu=h200")
    assert (cfg.kd.temperature, cfg.train.epochs) == (3.5, 7)
    assert cfg.train.batch_size == cfg.schedule.batch_size  # the rest stays


def test_the_command_line_beats_a_recipe(tmp_path: Path) -> None:
    cfg = composed(recipe_folder(tmp_path, "tiny_resnet_h200"), "gpu=h200", "kd.temperature=1.5")
    assert (cfg.kd.temperature, cfg.train.epochs) == (1.5, 7)


def test_another_pair_is_not_touched_by_a_recipe(tmp_path: Path) -> None:
    plain = OmegaConf.to_container(composed("gpu=cpu"))
    assert OmegaConf.to_container(composed(recipe_folder(tmp_path, "tiny_resnet_h200"), "gpu=cpu")) == plain
