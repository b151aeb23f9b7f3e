"""Every declared key is checked against its bounds, every key in `conf/` is declared, and the docs list them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import hawada
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from hawada.config import (
    KEYS,
    OLD_SPELLINGS,
    check_spellings,
    check_targets,
    conf_dir,
    problems,
    register_resolvers,
    validate,
)
from hawada.config.spellings import STRUCTURED_WEIGHT, spell_out
from hawada.config.values import Choice, Flag, ListOf, MappingOf, Name, Nested, Node, Number, Target, Text, Value
from hawada.tools.configuration_docs import document

CONF = Path(conf_dir())


@pytest.fixture(scope="module")
def configured() -> Any:
    """The configuration without arguments, composed once."""
    GlobalHydra.instance().clear()
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config")
    GlobalHydra.instance().clear()
    return cfg


@pytest.fixture(scope="module")
def plain(configured: Any) -> dict[str, Any]:
    """The same as plain dictionaries."""
    return OmegaConf.to_container(configured, resolve=True)  # type: ignore[return-value]


def with_value(plain: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy in which one key has another value; sections that are not there are made."""
    changed = dict(plain)
    node, parts = changed, key.split(".")
    for depth, part in enumerate(parts[:-1], start=1):
        made = {"_target_": "hawada.some.Thing"} if f"{'.'.join(parts[:depth])}._target_" in KEYS else {}
        node[part] = dict(node[part] if isinstance(node.get(part), dict) else made)
        node = node[part]
    node[parts[-1]] = value
    return changed


def odd_values(value: Value) -> Iterator[Any]:
    """Values below the bound, above it, not a number, and of the wrong type."""
    yield from ({"a": {}}, [[]])
    if isinstance(value, Number):
        below = value.low if value.above else value.low - 1
        yield from (below, value.high + (1 if value.whole else abs(value.high)), math.nan, -math.inf, "abc", True, "")
        if not value.infinite:
            yield math.inf
        if value.whole:
            yield value.low + 0.5
        if value.alone:
            yield value.low + 1
    elif isinstance(value, Choice):
        yield from ("no such choice", 17, math.nan)
    elif isinstance(value, Flag):
        yield from (0, 1, "yes", math.nan)
    elif isinstance(value, Text):
        yield from (3, math.nan, True, *(() if value.free else ("", " ", "a\x01b")))
    elif isinstance(value, Name):
        yield from ("", ".", "..", "a/b", "../a", "a\\b", "a\x00b", " ", "x" * 300, math.nan, True, 1.5)
    elif isinstance(value, Target):
        yield from ("", "no dots", "a..b", 3, math.nan)
    elif isinstance(value, ListOf):
        yield []
        if not value.or_one:
            yield from ("abc", 3)
        yield from ([each] for each in odd_values(value.each) if not isinstance(each, list | dict))
        if value.length is not None:
            yield [1] * (value.length + 1)
    elif isinstance(value, Nested):
        yield from (3, "", " ", math.nan, True, [], {})
    elif isinstance(value, MappingOf | Node):
        yield from (3, "abc", math.nan, [])


def refusals(plain: dict[str, Any]) -> list[tuple[str, str]]:
    return list(problems(plain))


def test_the_defaults_are_within_their_bounds(plain: dict[str, Any]) -> None:
    assert refusals(plain) == []


@pytest.mark.parametrize("key", KEYS)
def test_a_key_refuses_what_it_may_not_be_in_one_sentence(key: str, plain: dict[str, Any]) -> None:
    declared = KEYS[key].value
    odd = [value for value in odd_values(declared) if not (isinstance(declared, MappingOf) and value == {"a": {}})]
    assert len(odd) >= 4
    for value in odd:
        found = refusals(with_value(plain, key, value))
        named = [told for name, told in found if name == key or name.startswith(f"{key}.")]
        assert named, f"{key}={value!r} was accepted"
        assert named[0].startswith(key) and "; " in named[0] and "\n" not in named[0]
    found = refusals(with_value(plain, key, None))
    assert bool(found) == (KEYS[key].null is None), f"{key}=null"


@pytest.mark.parametrize("key", [key for key in KEYS if isinstance(KEYS[key].value, Number)])
def test_a_number_takes_both_ends_of_its_bounds(key: str, plain: dict[str, Any]) -> None:
    bounds = KEYS[key].value
    assert isinstance(bounds, Number)
    low = (bounds.low + bounds.high) / 2**20 if bounds.above else bounds.low
    for value in (low, bounds.high):
        assert refusals(with_value(plain, key, value)) == [], f"{key}={value}"


def test_a_value_is_named_where_it_was_set_and_not_where_it_is_read(configured: Any) -> None:
    cfg = copy.deepcopy(configured)
    cfg.schedule.batch_size = 0  # which five other keys follow
    with pytest.raises(ValueError, match=r"^schedule\.batch_size: 0 is not a whole number of at least 1"):
        validate(cfg)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("export.foo", 1, r"^export\.foo: there is no such key"),
        ("nonsense", {"a": 1}, r"^nonsense: there is no such key"),
        ("budget", 3, r"^budget: 3 is not a group of keys; set the keys below it, such as budget\.target_ms"),
        (
            "profile.calibration",
            3,
            r"^profile\.calibration: this key has another name now; write profile\.fitted_models",
        ),
        ("gpu.multiple.nonsense", 8, r"^gpu\.multiple\.nonsense: nonsense is not one of channel, branch"),
        ("export.minimum.nonsense", 8, r"^export\.minimum\.nonsense: nonsense is not one of channel, branch"),
        ("penalty.mine", {"weight": 1}, r"^penalty\.mine: .* is not a node with _target_"),
        ("measure.min_rounds", 90, r"^measure\.min_rounds: 90 is above measure\.max_rounds=80; lower it"),
    ],
)
def test_what_would_do_nothing_is_refused_by_name(key: str, value: Any, told: str, configured: Any) -> None:
    cfg = copy.deepcopy(configured)
    cfg.measure.max_rounds = 80
    OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(ValueError, match=told):
        validate(cfg)


def test_the_arguments_of_a_class_of_the_users_are_their_own_business(plain: dict[str, Any]) -> None:
    mine = with_value(plain, "gate", {"_target_": "mypackage.Gate", "temperature": -1, "colour": "red"})
    assert refusals(mine) == []
    own = with_value(plain, "model.adapter", {"_target_": "mypackage.Adapter", "num_classes": "many"})
    assert refusals(with_value(own, "gpu.multiple.tile", 8)) == []  # an adapter may declare kinds of its own
    assert refusals(with_value(mine, "gate._target_", "hawada.core.gates.gates.SigmoidGate"))


@pytest.mark.parametrize(
    ("node", "told"),
    [
        (
            {"_target_": "fractions.Fraction", "numerador": 1},
            r"^gate\.numerador: .*Fraction has no such argument; it takes n",
        ),
        (
            {"_target_": "textwrap.indent", "text": "a"},
            r"^gate\.prefix: textwrap\.indent needs it; set \+gate\.prefix=",
        ),
        ({"_target_": "no.such.Thing"}, r"^gate\._target_: no\.such\.Thing cannot be imported"),
    ],
)
def test_the_signature_of_a_class_is_its_schema(node: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_targets(OmegaConf.create({"gate": node}))
    check_targets(OmegaConf.create({"gate": {"_target_": "textwrap.indent", "text": "a", "prefix": "b"}}))


@pytest.mark.parametrize("old", OLD_SPELLINGS)
def test_an_old_spelling_is_refused_with_the_new_one(old: str) -> None:
    for argument in (f"{old}=1", f"+{old}=1", f"++{old}=1", f"~{old}", f"{old}.below=1"):
        with pytest.raises(ValueError, match=r"this key has another name now; write ") as error:
            check_spellings(["--multirun", "name=export.quality", argument])
        assert OLD_SPELLINGS[old] in str(error.value)
    check_spellings(["export.qualitative=1", "profile.held_out_models=3", "--cfg", "job"])


def test_the_new_spellings_are_declared() -> None:
    for new in OLD_SPELLINGS.values():
        words = [word.strip(",") for word in new.split()]
        assert all(word in KEYS for word in words if "." in word and "=" not in word)


def test_two_short_spellings_are_written_out(configured: Any) -> None:
    cfg = copy.deepcopy(configured)
    cfg.penalties.structured, cfg.interlingua.encoder_type = True, "byte"
    spell_out(cfg)
    assert (cfg.penalties.structured, cfg.interlingua.encoder_type) == (STRUCTURED_WEIGHT, "bytes")
    assert cfg.penalty.structured.weight == STRUCTURED_WEIGHT > 0
    cfg.penalties.structured = False
    spell_out(cfg)
    assert cfg.penalties.structured == 0 and not isinstance(cfg.penalties.structured, bool)
    validate(cfg)


def keys_of_file(path: Path) -> Iterator[str]:
    """The full keys that a file in `conf/` sets."""
    text = path.read_text()
    package = next((line.split()[2] for line in text.splitlines() if line.startswith("# @package")), None)
    prefix = package or ("_global_" if path.parent == CONF else path.parent.name)
    node = {name: value for name, value in yaml.safe_load(text).items() if name not in ("defaults", "hydra")}
    yield from _flat("" if prefix == "_global_" else prefix, node)


def _flat(prefix: str, node: dict[str, Any]) -> Iterator[str]:
    for name, value in node.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, dict) and value:
            yield from _flat(key, value)
        else:
            yield key


def test_every_key_of_every_file_is_declared_and_every_declared_key_is_in_a_file() -> None:
    found = {key for path in CONF.rglob("*.yaml") for key in keys_of_file(path)}
    assert found - set(KEYS) == set()
    sections = {key for key in KEYS if any(other.startswith(f"{key}.") for other in KEYS)}
    unused = set(KEYS) - found - sections
    assert unused == set()


def test_the_list_of_keys_is_up_to_date() -> None:
    written = (CONF.parent / "docs" / "configuration.md").read_text()
    assert written == document(), "python -m hawada.tools.configuration_docs writes it anew"


ODD = [
    # a line of the odd values that were once accepted, and what the sentence begins with
    ("lambda.init=.inf", "lambda.init"),
    ("lambda.init={a:1}", "lambda.init"),
    ("kd.temperature=''", "kd.temperature"),
    ("seed=99999999999999999999", "seed"),
    ("data.samples=-3", "data.samples"),
    ("model.adapter.image_size=0", "model.adapter.image_size"),
    ("data.image_size=100000", "data.image_size"),
    ("model.adapter.layers=[0,1,1,1]", "model.adapter.layers"),
    ("train.gate_optimizer.lr=nan", "train.gate_optimizer.lr"),
    ("finetune.trainer.weight_decay=nan", "finetune.trainer.weight_decay"),
    ("gpu.simulated.noise=nan", "gpu.simulated.noise"),
    ("gpu.multiple={nonsense:8}", "gpu.multiple.nonsense"),
    ("gpu.multiple={channel:100000}", "gpu.multiple.channel"),
    ("groups.name=[]", "groups.name"),
    ("name=../escape", "name"),
    ("name=a/b", "name"),
    ("output_dir=''", "output_dir"),
    ("finetune.recalibration_samples=1", "finetune.recalibration_samples"),
    ("export.quality.samples=1", "export.quality.samples"),
    ("runtime.mixed_precision=fp16", "runtime.mixed_precision"),
]


@pytest.mark.parametrize(("argument", "key"), ODD)
def test_an_odd_value_is_refused_by_the_command_and_nothing_is_written(
    argument: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = hawada(argument, "gpu.timing=simulated")
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"hawada: {key}: ")
    assert list(tmp_path.iterdir()) == []
