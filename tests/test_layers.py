"""Imports run one way, between rooms and within them, and no circle is closed anywhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hawada

SRC = Path(hawada.__file__).parent
FILES = sorted(SRC.rglob("*.py"))

# For each room, the other rooms that it may import. Modules of one room may import each other.
ROOMS: dict[str, set[str]] = {
    "__init__": {"api"},
    "__main__": {"cli"},
    "api": {"stages", "workspace", "adapters", "data", "report", "experiment", "config", "core"},
    "cli": {"stages", "interlingua", "workspace", "report", "experiment", "config", "core"},
    "stages": {"workspace", "adapters", "data", "report", "experiment", "config", "core"},
    "interlingua": {"workspace", "adapters", "data", "report", "experiment", "config", "core"},
    "workspace": {"adapters", "data", "report", "experiment", "config", "core"},
    "adapters": {"core", "experiment"},
    "data": {"core", "experiment"},
    "report": {"core", "experiment"},
    "experiment": {"core", "config"},
    "config": set(),
    "tools": {"api", "config", "experiment"},
    "core": set(),
}
# Within core, and within the adapters, likewise; a single file counts as a room of its own.
CORE: dict[str, set[str]] = {
    "verdict": set(),
    "structure": set(),
    "gates": {"structure", "files"},
    "formats": {"structure", "files"},
    "memory_format": set(),
    "files": set(),
    "task": {"structure"},
    "distill": {"structure", "gates", "formats", "verdict", "files", "task"},
    "latency": {"structure", "gates", "formats", "verdict", "files"},
    "evaluate": {"structure", "gates", "formats", "verdict", "files", "task", "distill", "latency"},
}
CORE["train"] = CORE["finetune"] = CORE["evaluate"] | {"evaluate"}
CORE["reconstruction"] = CORE["train"] | {"train", "finetune"}
CORE["importance"] = CORE["reconstruction"] | {"reconstruction"}
CORE["search"] = CORE["importance"] | {"importance"}
ADAPTERS: dict[str, set[str]] = {
    "base": set(),
    "saved": {"base"},
    "checkpoints": set(),
    "weights": {"base", "saved", "checkpoints"},
    "attach": {"base"},
    "graph": {"base", "saved", "weights"},
    "torchvision": {"base", "saved", "weights", "graph", "attach"},
    "huggingface": {"base", "saved", "weights", "graph", "attach"},
}
KEPT_OUT_OF_CORE = {"transformers", "torchvision", "hydra", "omegaconf"}
CONFIGURED = {"cli", "config", "experiment", "workspace", "stages", "interlingua", "tools"}  # may know Hydra
FAMILIES = re.compile(r"(?i:resnet|llama)|ViT|(?<![a-z])vit(?![a-z])")
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}
MODULES_IN_A_FOLDER = 15


def module_name(path: Path) -> str:
    """`src/hawada/core/train.py` as `hawada.core.train`; a package's `__init__` as the package."""
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


NAMES = {module_name(path): path for path in FILES}


def imported(source: str, module: str) -> Iterator[str]:
    """Full names of the modules that a source imports anywhere in it, relative imports resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def arrow_back(module: str, name: str, rooms: Mapping[str, set[str]], depth: int) -> str | None:
    """One sentence when an import runs against the arrow between the rooms at a depth of the tree, else None."""
    mine, theirs = module.split("."), name.split(".")
    if mine[:depth] != theirs[:depth] or len(mine) <= depth or len(theirs) <= depth:
        return None
    here, there = mine[depth], theirs[depth]
    if here not in rooms:
        return f"{module} is in no room that this test knows"
    if here == there or there not in rooms or there in rooms[here]:
        return None
    return f"{module} imports {name}: {here} may import only {sorted(rooms[here])}"


def violations(source: str, module: str) -> list[str]:
    """What a module's imports break, one sentence each."""
    room = module.split(".")[1]
    found = []
    for name in imported(source, module):
        root = name.split(".")[0]
        if root in ("hydra", "omegaconf") and room not in {*CONFIGURED, "core"}:
            found.append(f"{module} imports {name}: only {sorted(CONFIGURED)} may")
        if root in KEPT_OUT_OF_CORE and room == "core":
            found.append(f"{module} imports {name}: core knows no such library")
        if root != "hawada":
            continue
        for rooms, prefix in ((ROOMS, "hawada"), (CORE, "hawada.core"), (ADAPTERS, "hawada.adapters")):
            depth = prefix.count(".") + 1
            if name.startswith(f"{prefix}.") and module.startswith(f"{prefix}."):
                back = arrow_back(module, name, rooms, depth)
                found += [] if back is None else [back]
    return found


def dependencies(path: Path) -> set[str]:
    """The modules of this package that a file imports; a name that a room offers counts as the room's inner module."""
    module, found = module_name(path), set()
    for name in imported(path.read_text(), module):
        for candidate in (name, name.rpartition(".")[0]):
            if candidate in NAMES:
                found.add(offered(candidate).get(name.rpartition(".")[2], candidate) if candidate != name else name)
                break
    return found - {module}


def offered(room: str) -> dict[str, str]:
    """The names that a room's stub lists, with the module that each comes from."""
    stub = NAMES[room].with_suffix(".pyi")
    if not stub.is_file():
        return {}
    nodes = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{room}.{node.module}" for node in nodes for alias in node.names}


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


def test_no_imports_form_a_circle() -> None:
    graph = {module_name(path): dependencies(path) for path in FILES}
    assert sum(map(len, graph.values())) > 300
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_a_circle_is_caught() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()


def test_every_module_belongs_to_a_room() -> None:
    assert len(FILES) > 20
    assert {module_name(path).split(".")[1] for path in FILES if path != SRC / "__init__.py"} <= set(ROOMS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hawada.core.gates.gates", "from hawada.adapters.base import Adapter"),
        ("hawada.core.gates.gates", "from hawada import adapters"),
        ("hawada.core.gates.gates", "from ...adapters.base import Adapter"),
        ("hawada.core.gates.gates", "import hawada.experiment"),
        ("hawada.core.gates.gates", "def late():\n    from torchvision import models"),
        ("hawada.core.gates.gates", "import transformers"),
        ("hawada.core.gates.gates", "from omegaconf import DictConfig"),
        ("hawada.core.gates.gates", "from hawada.core.latency import Rounds"),
        ("hawada.core.structure.groups", "from hawada.core.gates import Student"),
        ("hawada.core.latency.proxy", "from hawada.core.evaluate import score"),
        ("hawada.core.train", "from hawada.core.search import Allocation"),
        ("hawada.adapters.base", "from hawada.interlingua.encoder import Encoder"),
        ("hawada.adapters.graph.trace", "from hawada.adapters.torchvision import ResNetAdapter"),
        ("hawada.adapters.base", "from hawada.config import build"),
        ("hawada.interlingua.encoder", "from hawada.stages import train"),
        ("hawada.stages.train", "from hawada.interlingua import encoder"),
        ("hawada.data.vision", "import hydra.utils"),
        ("hawada.experiment.run", "from hawada.workspace import Subject"),
        ("hawada.stages.train", "from hawada.cli import main"),
        ("hawada.config.schema", "from hawada.experiment import PLANS"),
    ],
)
def test_an_import_against_the_arrow_is_caught(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hawada.stages.train", "from hawada.core.gates import parameter_groups\nfrom omegaconf import DictConfig"),
        ("hawada.adapters.attach", "from .base import Adapter\nimport torchvision"),
        ("hawada.core.train", "import torch\nfrom hawada.core.gates import Student"),
        ("hawada.experiment.run", "from hawada.experiment.plan import PLANS"),
        ("hawada.interlingua.stages.train", "from hawada.workspace import Stopwatch"),
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
def test_a_file_has_a_telling_name(path: Path) -> None:
    assert path.stem not in VAGUE


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda folder: folder.name)
def test_a_folder_can_be_taken_in_at_a_glance(folder: Path) -> None:
    modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MODULES_IN_A_FOLDER or folder.name == "runtimes"


def test_the_command_starts_without_torch() -> None:
    modules = "hawada.cli, hawada.config, hawada.experiment.run, hawada.experiment.plan"
    script = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'torchvision'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
