"""Where the configuration lies, and how objects are made from it. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

# Arguments that objects are made with besides the keys beside their `_target_`, by node.
SUPPLIED = {
    "gate": ("shape",),
    "data": ("tokenizer", "mean", "std", "samples", "seed"),
    "proxy": ("table",),
    "measure": ("precision", "max_rounds"),
    "train.gate_optimizer": ("params",),
    "train.weight_optimizer": ("params",),
    "interlingua.pooling": ("latents", "width"),
}


def conf_dir() -> str:
    """The folder with the configuration: inside the wheel, else in the checkout."""
    package = Path(__file__).resolve().parents[1]
    return str(next(path for path in (package / "conf", package.parents[1] / "conf") if path.is_dir()))


def register_resolvers() -> None:
    """`${unless:a,b}` is null when `a` is set and `b` otherwise: a default that gives way to an alternative key."""
    OmegaConf.register_new_resolver(
        "unless", lambda given, default: None if given is not None else default, replace=True
    )


def leave_out_shipped(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Leave out of `data` what belongs to the data set that a function of the user's own replaces.

    Args:
        cfg: the composed configuration, which is changed where `data._target_` is not of this package.
        overrides: what was given on the command line (`data.size=3`), whose keys stay.
    """
    target = cfg.data.get("_target_")
    given = {key.partition("=")[0] for key in overrides}
    if isinstance(target, str) and not target.startswith("hawada.") and "data._target_" in given:
        for name in [str(name) for name in cfg.data if name != "_target_"]:
            if f"data.{name}" not in given:
                with open_dict(cfg.data):
                    del cfg.data[name]


def build(node: Any, **arguments: Any) -> Any:
    """Make the object that a node's `_target_` names; the only place that instantiates.

    Args:
        node: a config node with `_target_`.
        arguments: objects handed to the constructor as they are.

    Raises:
        ValueError: one sentence naming the target, when it cannot be imported or refuses its arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        partial = instantiate(node, _convert_="all", _partial_=True)
        return partial(**arguments)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ValueError(f"{node.get('_target_')}: {' '.join(str(cause).split())}") from error
    except TypeError as error:
        raise ValueError(f"{node.get('_target_')}: {error}; its arguments are the keys beside _target_") from error


def check_targets(node: Any, key: str = "") -> None:
    """Check that every class that a configuration names can be imported and takes the keys beside its name.

    Raises:
        ValueError: naming the key.
    """
    if OmegaConf.is_list(node):
        for index, inner in enumerate(node):
            check_targets(inner, f"{key}[{index}]")
    if not OmegaConf.is_dict(node):
        return
    for name, inner in node.items():
        here = f"{key}.{name}" if key else str(name)
        if name == "_target_":
            try:
                made = resolve_name(inner)
            except Exception as error:  # whatever importing a user's module may raise
                reason = " ".join(str(error).split())
                raise ValueError(f"{here}: {inner} cannot be imported ({reason}); is its package installed?") from error
            _check_signature(made, node, key)
        check_targets(inner, here)


def _check_signature(made: Any, node: Any, key: str) -> None:
    """Check the keys beside a `_target_` against what the class or function takes.

    Raises:
        ValueError: naming the argument that is not known, or the one that is not given.
    """
    try:
        parameters = inspect.signature(made).parameters.values()
    except (TypeError, ValueError):  # some classes written in C have none
        return
    kinds = inspect.Parameter
    named = [each for each in parameters if each.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    given = {str(name) for name in node if not str(name).startswith("_")}
    unknown = sorted(given - {each.name for each in named})
    if unknown and not any(each.kind is kinds.VAR_KEYWORD for each in parameters):
        raise ValueError(
            f"{key}.{unknown[0]}: {node['_target_']} has no such argument; it takes "
            f"{', '.join(each.name for each in named) or 'none'}"
        )
    supplied = {*given, *SUPPLIED.get(key, ())}
    missing = [each.name for each in named if each.default is kinds.empty and each.name not in supplied]
    if missing and "_args_" not in node:
        raise ValueError(f"{key}.{missing[0]}: {node['_target_']} needs it; set +{key}.{missing[0]}=...")
