"""Writes `docs/configuration.md` from the schema and the files in `conf/`.

Run it as `python -m hawada.tools.configuration_docs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from hawada.config import KEYS, OLD_SPELLINGS, Key, conf_dir, register_resolvers

HEAD = """# Configuration

Every key, what it means, what it may be and its default, and every choice. This file is written by
`python -m hawada.tools.configuration_docs` from `hawada.config.schema` and the files in `conf/`; change those.

A key is set as `key=value` on the command line. A default in the form `${other.key}` follows another key. A key without
a default belongs to some choices of its group only. Of a class of your own (`_target_=mypackage.parts.Mine`) the
arguments of its constructor are the keys, and the bounds below do not apply.
"""


def document() -> str:
    """The whole file."""
    parts = [HEAD, "## Choices\n", *_choices(), "\n## Keys\n", *_keys(), "\n## Old spellings\n", *_old_spellings()]
    return "\n".join(parts).rstrip() + "\n"


def _choices() -> Iterator[str]:
    """One line for each choice of a group, with the first comment of its file."""
    yield "| choice | what it is for |\n|---|---|"
    for file in sorted(Path(conf_dir()).glob("*/*.yaml")):
        comments = [line[2:] for line in file.read_text().splitlines() if line.startswith("# ")]
        first = next(line for line in comments if not line.startswith("@package"))
        yield f"| `{file.parent.name}={file.stem}` | {_cell(first)} |"


def _keys() -> Iterator[str]:
    """A table for each section."""
    defaults = _defaults()
    section = None
    for name, key in KEYS.items():
        first = name.partition(".")[0] if "." in name or any(other.startswith(f"{name}.") for other in KEYS) else ""
        if first != section:
            yield (f"\n### {first}\n" if first else "") + "\n| key | meaning | values | default |\n|---|---|---|---|"
            section = first
        yield f"| `{name}` | {_cell(_meaning(key))} | {_cell(_values(key))} | {_default(defaults, name)} |"


def _old_spellings() -> Iterator[str]:
    yield "These are refused, and the new spelling is named.\n\n| old | new |\n|---|---|"
    for old, new in OLD_SPELLINGS.items():
        yield f"| `{old}` | {new} |"


def _meaning(key: Key) -> str:
    return key.meaning + (f", in {key.unit}" if key.unit else "")


def _values(key: Key) -> str:
    return str(key.value) + (f"; null: {key.null}" if key.null else "")


def _default(defaults: DictConfig, name: str) -> str:
    """The default as it is written in `conf/`; empty where the default choices have no such key."""
    parent, _, last = name.rpartition(".")
    node: Any = OmegaConf.select(defaults, parent) if parent else defaults
    if not isinstance(node, DictConfig) or last not in node:
        return ""
    value = OmegaConf.to_container(node, resolve=False)[last]  # type: ignore[index, call-overload]  # a mapping
    return "" if isinstance(value, dict) else f"`{_cell(value if isinstance(value, str) else json.dumps(value))}`"


def _defaults() -> DictConfig:
    """The configuration of the command without arguments."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        defaults = compose("config")
    GlobalHydra.instance().clear()
    return defaults


def _cell(text: str) -> str:
    """Text that breaks no table."""
    return text.replace("|", "\\|").replace("\n", "\\n")


def main() -> None:
    """Write the file in the checkout."""
    Path(conf_dir()).with_name("docs").joinpath("configuration.md").write_text(document())


if __name__ == "__main__":
    main()
