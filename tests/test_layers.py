"""Imports run one way: cli -> stages -> {adapters, interlingua, data, report} -> core -> torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hawada

SRC = Path(hawada.__file__).parent
FILES = sorted(SRC.rglob("*.py"))

# For each layer, the others that it may import; whatever is inside one layer may import each other.
ARROWS: dict[str, set[str]] = {
    "__init__": {"adapters"},
    "cli": {"stages", "run", "plan", "config", "report"},
    "stages": {"adapters", "interlingua", "data", "report", "core", "run", "plan", "config"},
    "run": {"plan", "config"},
    "plan": set(),
    "config": {"core"},
    "adapters": {"core"},
    "interlingua": {"core"},
    "data": {"core"},
    "report": {"core"},
    "core": set(),
}
KEPT_OUT_OF_CORE = {"transformers", "torchvision"}
CONFIGURED = {"cli", "config", "run", "plan", "stages"}  # the only ones that know Hydra and OmegaConf
FAMILIES = re.compile(r"(?i:resnet|llama)|ViT|(?<![a-z])vit(?![a-z])")
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}


def module_name(path: Path) -> str:
    """`src/hawada/core/gates.py` as `hawada.core.gates`; a package's `__init__` as the package."""
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imported(source: str, module: str) -> Iterator[str]:
    """Full names of the modules that a source imports anywhere in it, relative imports resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def violations(source: str, module: str) -> list[str]:
    """What a module's imports break, one sentence each."""
    layer = module.split(".")[1]
    found = []
    for name in imported(source, module):
        root, *rest = name.split(".")
        if root in ("hydra", "omegaconf") and layer not in CONFIGURED:
            found.append(f"{module} imports {name}: only {sorted(CONFIGURED)} may")
        if root in KEPT_OUT_OF_CORE and layer == "core":
            found.append(f"{module} imports {name}: core knows no such library")
        if root != "hawada" or not rest or rest[0] not in ARROWS or rest[0] == layer:
            continue
        inner = ".".join(rest) + "."
        if not any(inner.startswith(f"{allowed}.") for allowed in ARROWS[layer]):
            found.append(f"{module} imports {name}: {layer} may import only {sorted(ARROWS[layer])}")
    return found


def docstrings(tree: ast.AST) -> set[int]:
    """Identities of the constants that are docstrings (or strings that stand alone)."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def family_names(source: str) -> list[str]:
    """Identifiers and strings of a source that name a model family; docstrings and comments may."""
    tree = ast.parse(source)
    prose, words = docstrings(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words.append(node.value)
        words += [getattr(node, field) for field in ("name", "id", "attr", "arg", "module") if hasattr(node, field)]
    return [word for word in words if isinstance(word, str) and FAMILIES.search(word)]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_follow_the_arrow(path: Path) -> None:
    assert violations(path.read_text(), module_name(path)) == []


def test_every_module_belongs_to_a_layer() -> None:
    assert len(FILES) > 20
    assert {module_name(path).split(".")[1] for path in FILES} <= set(ARROWS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hawada.core.gates", "from hawada.adapters.base import Adapter"),
        ("hawada.core.gates", "from hawada import adapters"),
        ("hawada.core.gates", "from ..adapters.base import Adapter"),
        ("hawada.core.gates", "import hawada.run"),
        ("hawada.core.gates", "def late():\n    from torchvision import models"),
        ("hawada.core.gates", "import transformers"),
        ("hawada.core.gates", "from omegaconf import DictConfig"),
        ("hawada.adapters.base", "from hawada.interlingua.encoder import Encoder"),
        ("hawada.interlingua.encoder", "from hawada.adapters import base"),
        ("hawada.adapters.base", "from hawada.config import build"),
        ("hawada.data.vision", "import hydra.utils"),
        ("hawada.report.table", "from hawada.plan import PLANS"),
        ("hawada.stages.train", "from hawada.cli import main"),
        ("hawada.run", "from hawada.stages.train import run"),
        ("hawada.cli", "from hawada.core.gates import SigmoidGate"),
        ("hawada.config", "from hawada.plan import PLANS"),
    ],
)
def test_an_import_against_the_arrow_is_caught(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hawada.stages.train", "from hawada.core.gates import parameter_groups\nfrom omegaconf import DictConfig"),
        ("hawada.adapters.attach", "from .base import Adapter\nimport torchvision"),
        ("hawada.core.train", "import torch\nfrom hawada.core.student import Student"),
        ("hawada.run", "from hawada.plan import PLANS"),
    ],
)
def test_an_import_along_the_arrow_is_not(module: str, source: str) -> None:
    assert violations(source, module) == []


@pytest.mark.parametrize("path", sorted((SRC / "core").rglob("*.py")), ids=module_name)
def test_core_names_no_model_family(path: Path) -> None:
    assert family_names(path.read_text()) == []


def test_a_model_family_in_code_is_caught_and_in_prose_is_not() -> None:
    assert (
        family_names('def f(arch):\n    """As in ResNet and ViT."""\n    # llama\n    return arch == "activity"') == []
    )
    assert family_names('def f(arch):\n    return arch == "resnet18"') == ["resnet18"]
    assert family_names("class ViTGate: pass\nllama_heads = 1\nx.vit = 2") == ["ViTGate", "llama_heads", "vit"]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_has_a_telling_name_and_a_readable_length(path: Path) -> None:
    assert path.stem not in VAGUE
    assert len(path.read_text().splitlines()) <= 400


def test_the_command_starts_without_torch() -> None:
    modules = "hawada.cli, hawada.config, hawada.run, hawada.plan"
    script = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'torchvision'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
