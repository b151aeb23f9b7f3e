"""The run directory: one folder an experiment, one below it a stage; locked, resumable, never overwritten unasked."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf

from hawada.experiment.files import sha256, write_json, write_text
from hawada.experiment.plan import INTERLINGUA, OF_GROUP, PLANS, TARGET, everything_read, upstream

MANIFEST = "manifest.json"

ABSENT = object()  # in place of the value of a key that was not there yet


class Run:
    """The directory of one experiment.

    A stage is finished when its folder has a manifest, which is written last and holds the SHA-256 of every other
    file and the config that the stage was handed.

    Args:
        root: outputs/<name>, or in a multirun the job's own subdirectory.
        cfg: the whole configuration.
        shared: in a multirun, outputs/<name>: stages that no swept key touches are done once, there.
        swept: keys that differ between jobs.
        overwrite: redo stages whose results came from another configuration.
    """

    def __init__(
        self,
        root: Path,
        cfg: DictConfig,
        *,
        shared: Path | None = None,
        swept: Iterable[str] = (),
        overwrite: bool = False,
    ) -> None:
        self.root, self.cfg, self.overwrite = root, cfg, overwrite
        self.shared, self.swept = shared or root, tuple(OF_GROUP.get(key, key) for key in swept)
        self._folders: dict[str, Path] = {}

    def folder(self, stage: str) -> Path:
        """Where a stage writes."""
        if stage not in self._folders:
            sources = _sources(self.cfg, everything_read(stage, self.cfg)) if self.swept else ()
            touched = any(_overlap(key, source) for key in self.swept for source in sources)
            self._folders[stage] = (self.root if touched else self.shared) / stage
        return self._folders[stage]

    def is_finished(self, stage: str) -> bool:
        """Whether a stage's result is there and every file is as the manifest says."""
        folder = self.folder(stage)
        if not (folder / MANIFEST).is_file():
            return False
        files = self._manifest(stage)["files"]
        return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in files.items())

    def discard(self, stage: str) -> None:
        """Make a stage count as not finished."""
        (self.folder(stage) / MANIFEST).unlink(missing_ok=True)

    def result(self, stage: str) -> dict[str, Any]:
        """What a finished stage wrote."""
        return json.loads((self.folder(stage) / "result.json").read_text())

    def settings(self, stage: str) -> DictConfig:
        """The part of the configuration that a stage may read; anything else raises when it is read."""
        settings = OmegaConf.create()
        for key in PLANS[stage].reads:
            OmegaConf.update(settings, key, _plain(OmegaConf.select(self.cfg, key)))
        OmegaConf.set_struct(settings, True)
        return settings

    def check(self, stage: str) -> bool:
        """Whether a stage is already done with this very configuration and from what is upstream of it now.

        Raises:
            ValueError: when its results, or those of a stage before it, came from another configuration.
        """
        if not self.is_finished(stage):
            return False
        different = self.different_keys(stage)
        if not different:
            return self._manifest(stage)["upstream"] == self._upstream_now(stage)
        if self.overwrite:
            return False
        raise ValueError(
            f"{self.folder(stage)} holds results made with {_described(different)}; "
            "choose another name=..., or set overwrite=true to replace them"
        )

    def check_upstream(self, stage: str) -> None:
        """Check that every stage before this one is done, with this configuration.

        Raises:
            ValueError: naming the stage to run, or the keys that differ.
        """
        for earlier in upstream(stage, self.cfg):
            if not self.is_finished(earlier):
                raise ValueError(
                    f"stage={stage}: it needs what stage={earlier} writes to {self.folder(earlier)}, "
                    f"which is not there; run stage={earlier} first"
                    + ("" if stage in INTERLINGUA else ", or stage=pipeline for everything")
                )
            different = self.different_keys(earlier)
            if earlier == "train" and PLANS[stage].retargets:
                different = {key: value for key, value in different.items() if key not in TARGET}
            if different:
                raise ValueError(
                    f"stage={stage}: {earlier} ran with {_described(different)}; "
                    f"use the same values, another name=..., or run stage={earlier} overwrite=true first"
                )

    @contextmanager
    def writing(self, stage: str) -> Iterator[Path]:
        """A stage's empty folder; what an unfinished or replaced attempt left there is removed first."""
        folder = self.folder(stage)
        clear(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(self.settings(stage)))
        yield folder

    @contextmanager
    def resuming(self, stage: str) -> Iterator[Path]:
        """A stage's folder with what an attempt left there that was broken off with this very configuration."""
        folder = self.folder(stage)
        attempt = {"config": self._read_values(stage), "upstream": self._upstream_now(stage)}
        begun, text = folder / "attempt.json", json.dumps(attempt, indent=1)
        if (folder / MANIFEST).is_file() or not begun.is_file() or begun.read_text() != text:
            with self.writing(stage):
                write_text(begun, text)
        yield folder

    def finish(self, stage: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write a stage's result and then its manifest."""
        folder = self.folder(stage)
        write_json(folder / "result.json", result)
        files = {
            str(path.relative_to(folder)): sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path != folder / MANIFEST
        }
        write_json(
            folder / MANIFEST,
            {
                "stage": stage,
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "config": self._read_values(stage),
                "upstream": self._upstream_now(stage),
                "files": files,
            },
        )
        return dict(result)

    def check_writable(self) -> None:
        """Check, without making anything, that the experiment's folder can be written.

        Raises:
            ValueError: naming the folder that cannot.
        """
        for folder in {self.root, self.shared}:
            nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
            if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
                raise ValueError(
                    f"output_dir: cannot write to {folder} ({nearest} does not allow it); "
                    "set output_dir to a folder you may write"
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the experiment's lock, so that two runs never write to one directory.

        Raises:
            ValueError: when the directory cannot be written or another run holds it.
        """
        handles = []
        try:
            for folder in dict.fromkeys((self.shared, self.root)):
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    handle = open(folder / ".lock", "a+")  # noqa: SIM115 (closed below)
                except OSError as error:
                    raise ValueError(
                        f"output_dir: cannot write to {folder} ({error.strerror}); "
                        "set output_dir to a folder you may write"
                    ) from None
                handles.append(handle)
                if not _lock(handle):
                    raise ValueError(
                        f"{folder} is in use by another run; wait for it, or choose another name=..."
                    ) from None
            yield
        finally:
            for handle in handles:
                handle.close()

    def _manifest(self, stage: str) -> dict[str, Any]:
        return json.loads((self.folder(stage) / MANIFEST).read_text())

    def _upstream_now(self, stage: str) -> dict[str, str | None]:
        """Digests of the manifests that a stage's result was, or would be, made from."""
        manifests = {earlier: self.folder(earlier) / MANIFEST for earlier in upstream(stage, self.cfg)}
        return {name: sha256(path) if path.is_file() else None for name, path in manifests.items()}

    def _read_values(self, stage: str) -> dict[str, Any]:
        """Flat `key: value` of what a stage reads."""
        values: dict[str, Any] = {}
        for key in PLANS[stage].reads:
            _flatten(key, _plain(OmegaConf.select(self.cfg, key)), values)
        return values

    def different_keys(self, stage: str) -> dict[str, Any]:
        """Keys whose value was another when the stage ran, with that value; `ABSENT` where there was no such key."""
        before = self._manifest(stage)["config"]
        now = json.loads(json.dumps(self._read_values(stage)))
        return {key: before.get(key, ABSENT) for key in sorted({*before, *now}) if before.get(key) != now.get(key)}


def _lock(handle: IO[str]) -> bool:
    """Lock an open file until it is closed; False when another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _described(different: Mapping[str, Any]) -> str:
    items = [f"no {key}" if value is ABSENT else f"{key}={value}" for key, value in different.items()]
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def _overlap(first: str, second: str) -> bool:
    """Whether one key is the other or contains it."""
    return f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}.")


def _plain(node: Any) -> Any:
    """A config node as resolved lists and dicts; anything else as it is."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _sources(cfg: DictConfig, keys: Iterable[str]) -> set[str]:
    """The given keys and every key that their values are interpolated from, however indirectly."""
    found: set[str] = set()
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        if key in found:
            continue
        found.add(key)
        parent, _, last = key.rpartition(".")
        container = OmegaConf.select(cfg, parent) if parent else cfg
        raw = OmegaConf.to_container(container, resolve=False) if OmegaConf.is_config(container) else {}
        node = raw.get(last) if isinstance(raw, dict) else None
        waiting.extend(re.findall(r"\$\{([A-Za-z_][\w.]*)\}", json.dumps(node, default=str)))
    return found


def _flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _flatten(f"{prefix}.{key}", inner, into)
    else:
        into[prefix] = value


def clear(folder: Path) -> None:
    """Remove a stage's folder, its manifest first, so that an interruption never leaves a valid-looking one."""
    import shutil

    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)
