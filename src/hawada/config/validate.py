"""Checks of a composed configuration that need nothing but the configuration: no torch, no device, no data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hawada.config.schema import KEYS, KINDS, Key
from hawada.config.spellings import new_spelling
from hawada.config.values import MappingOf, Nested, Node

MISSING = "???"
ABSENT = object()
GATES = "hawada.core.importance.Gates"  # the only importance whose scores also compare groups
# Classes whose arguments are declared here; those of any other are its own business, see `check_targets`.
DECLARED_CLASSES = ("hawada.", "torch.optim.")
SECTIONS = {key.rpartition(".")[0] for key in KEYS} | {
    ".".join(parts[:depth]) for parts in (key.split(".") for key in KEYS) for depth in range(1, len(parts))
}


def validate(cfg: DictConfig) -> None:
    """Check every value against the schema, whatever stage reads it.

    Args:
        cfg: the composed configuration.

    Raises:
        ValueError: one sentence with the key, what came, what was expected and the remedy.
    """
    plain, raw = _as_mapping(cfg, resolve=True), _as_mapping(cfg, resolve=False)
    found = list(problems(plain))
    if found:  # where a key follows another, that one is named
        own = [(key, told) for key, told in found if not _follows(raw, key)]
        raise ValueError((own or found)[0][1])
    _check_together(cfg)


def check_given(cfg: DictConfig, reads: Iterable[str]) -> None:
    """Check that keys without a default have a value, and that the folder of the data exists.

    Args:
        cfg: the composed configuration.
        reads: the keys that the stages read; only these need a value where `conf/` has none.

    Raises:
        ValueError: naming the key and the remedy.
    """
    read = {key.partition(".")[0] for key in reads}
    missing = sorted(key for key in OmegaConf.missing_keys(cfg) if key.partition(".")[0] in read)
    if missing:
        raise ValueError(f"{missing[0]}: no value is given; set {missing[0]}=...")
    root = None if "data" not in read or OmegaConf.is_missing(cfg.data, "root") else cfg.data.get("root")
    if root is not None and not Path(root).exists():
        raise ValueError(f"data.root: {root} does not exist; set data.root to the folder that holds the data")


def problems(plain: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each key that is wrong, with a sentence about it, in the order of the schema; unknown keys come last.

    Args:
        plain: the resolved configuration; a missing value is `???`.
    """
    for section in sorted(SECTIONS - {""}):
        value = _find(plain, section)
        if value is ABSENT or isinstance(value, Mapping) or section in KEYS:
            continue
        yield section, f"{section}: {value} is not a group of keys; set the keys below it, such as {_example(section)}"
    for name, key in KEYS.items():
        value = _find(plain, name)
        if value is ABSENT or value == MISSING or _is_foreign(plain, name):
            continue
        if value is None:
            if key.null is None:
                yield name, f"{name}: null is not {key.value}; {key.remedy or f'set {name} to one'}"
            continue
        told = key.value.problem(name, value)
        if told:
            yield name, f"{told}; {_remedy(name, key, told)}"
    yield from _unknown_kinds(plain)
    yield from _undeclared(plain)


def _remedy(name: str, key: Key, told: str) -> str:
    """What to do about a value."""
    if key.remedy:
        return key.remedy
    where = told.partition(":")[0]
    return f"set {where} to one of them" if " is not one of " in told else f"set {where} to one"


def _unknown_kinds(plain: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Kinds of groups that no adapter of ours declares."""
    if _is_foreign(plain, "model.adapter.path"):
        return
    for name in ("gpu.multiple", "export.minimum"):
        value = _find(plain, name)
        for kind in value if isinstance(value, Mapping) else ():
            if kind not in KINDS:
                yield f"{name}.{kind}", f"{name}.{kind}: {kind} is not one of {', '.join(KINDS)}; name one of them"


def _undeclared(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys that nothing reads; what stands beside a `_target_` is checked against its signature elsewhere."""
    free = prefix in KEYS and isinstance(KEYS[prefix].value, MappingOf | Nested | Node)
    if free or "_target_" in plain:
        return
    for name, value in plain.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if key in SECTIONS and isinstance(value, Mapping):
            yield from _undeclared(value, key)
        elif key not in KEYS and key not in SECTIONS:
            yield key, new_spelling(key) or f"{key}: there is no such key; `hawada --cfg job` lists them"


def _as_mapping(cfg: DictConfig, *, resolve: bool) -> dict[str, Any]:
    """The configuration as plain dictionaries."""
    plain = OmegaConf.to_container(cfg, resolve=resolve)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def _find(plain: Mapping[str, Any], key: str) -> Any:
    """The value of a key, or ABSENT."""
    value: Any = plain
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ABSENT
        value = value[part]
    return value


def _follows(raw: Mapping[str, Any], key: str) -> bool:
    """Whether a key's value comes from another key."""
    value: Any = raw
    for part in key.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        if isinstance(value, str) and "${" in value:
            return True
    return False


def _is_foreign(plain: Mapping[str, Any], key: str) -> bool:
    """Whether a key is an argument of a class of the user's, whose own signature is the schema."""
    parent, _, last = key.rpartition(".")
    while parent:
        target = _find(plain, f"{parent}._target_")
        if isinstance(target, str) and not target.startswith(DECLARED_CLASSES):
            return last != "_target_"
        parent, _, last = parent.rpartition(".")
    return False


def _example(section: str) -> str:
    return next(key for key in KEYS if key.startswith(f"{section}."))


def _check_together(cfg: DictConfig) -> None:
    """What several keys must agree on."""
    if cfg.budget.target_ms is not None and cfg.budget.target_ratio is not None:
        raise ValueError(
            "budget.target_ratio: a target in milliseconds (budget.target_ms or latency_target_ms) is given too; "
            "set one of the two and leave the other out"
        )
    ranked_by = cfg.export.importance.get("_target_")
    if ranked_by != GATES and (
        cfg.export.sensitivity == "gates" or cfg.export.widths == "gates" or not cfg.calibration.samples
    ):
        raise ValueError(
            f"importance: the scores of {ranked_by} rank units within a group and do not compare groups; set "
            "export.sensitivity=measured, export.widths=allocation and calibration.samples above 0"
        )
    if ranked_by != GATES and cfg.budget.target_ratio is None and cfg.budget.target_ms is None:
        raise ValueError(
            f"importance: without a target the gates alone decide, and {ranked_by} would rank nothing; set "
            "budget.target_ratio, or importance=gates"
        )
    if cfg.gpu.timing != "table" and cfg.gpu.table is not None:
        raise ValueError(f"gpu.table: {cfg.gpu.table} is read with gpu.timing=table alone; set that, or leave it out")
    if cfg.export.push == "gated" and cfg.export.push_to is None:
        raise ValueError("export.push: gated is what is pushed to export.push_to; set that too, or export.push=slim")
    if cfg.penalties.floor > cfg.penalties.ceiling:
        raise ValueError(f"penalties.floor: {cfg.penalties.floor} is above penalties.ceiling; lower it")
    if cfg.measure.get("max_rounds") is not None and cfg.measure.get("min_rounds", 0) > cfg.measure.max_rounds:
        raise ValueError(
            f"measure.min_rounds: {cfg.measure.min_rounds} is above measure.max_rounds={cfg.measure.max_rounds}; "
            "lower it"
        )
