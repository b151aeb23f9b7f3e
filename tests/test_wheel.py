"""What users install: the wheel carries the configuration, and the command works far from any checkout."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What `hawada --cfg job` needs at run time; copied from here because tests run without a network.
NEEDED = (
    *("hydra", "omegaconf", "antlr4", "yaml", "_yaml", "packaging", "lazy_loader", "filelock"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions"),
)
DISTRIBUTIONS = ("hydra_core", "omegaconf", "antlr4_python3_runtime", "pyyaml", "packaging")


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command with no trace of this checkout or environment in what it sees."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HYDRA", "VIRTUAL"))}
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    if importlib.util.find_spec("hatchling"):
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    elif importlib.util.find_spec("build"):
        build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    else:
        pytest.skip("neither hatchling nor build is installed; pip install -e '.[test]' brings both")
    run(build, ROOT)
    (built,) = folder.glob("*.whl")
    return built


def link_dependencies(site_packages: Path) -> None:
    """Make only the packages that the command needs visible in a new environment."""
    for name in NEEDED:
        spec = importlib.util.find_spec(name)
        if spec is None:  # PyYAML's C part is optional
            continue
        if spec.submodule_search_locations is None:  # a single file
            assert spec.origin is not None
            source = Path(spec.origin)
        else:
            source = Path(next(iter(spec.submodule_search_locations)))
        (site_packages / source.name).symlink_to(source, target_is_directory=source.is_dir())
        for record in source.parent.glob("*.dist-info"):
            link = site_packages / record.name
            if record.name.lower().startswith(DISTRIBUTIONS) and not link.exists():
                link.symlink_to(record, target_is_directory=True)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, its command-line dependencies and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    link_dependencies(site_packages)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], folder)
    return folder


def test_the_wheel_holds_the_whole_configuration_and_nothing_beside_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {str(Path("hawada/conf") / path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    assert "hawada/conf/config.yaml" in here
    assert here <= names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"hawada"}


def test_the_installed_command_composes_its_configuration_anywhere(environment: Path, tmp_path: Path) -> None:
    done = run([str(environment / "bin" / "hawada"), "--cfg", "job", "gpu=4090", "latency_target_ms=20"], tmp_path)
    assert done.stderr == ""
    assert "budget:" in done.stdout and "name: rtx4090" in done.stdout
    assert "latency_target_ms: 20" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_installed_package_is_the_wheels_own_and_needs_no_torch_to_start(environment: Path, tmp_path: Path) -> None:
    script = "import hawada.cli, hawada.config, sys; print(hawada.config.conf_dir(), 'torch' in sys.modules)"
    done = run([str(environment / "bin" / "python"), "-c", script], tmp_path)
    folder, torch = done.stdout.split()
    assert Path(folder).is_relative_to(environment) and Path(folder).parts[-2:] == ("hawada", "conf")
    assert torch == "False"
