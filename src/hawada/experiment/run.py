"""The run directory: one folder an experiment, one below it a stage; locked, resumable, never overwritten unasked."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from hawada.core.files import is_signed, sha256, whole_name, write_json, write_text
from hawada.experiment.plan import EVERY_STAGE_WRITES, INTERLINGUA, OF_GROUP, PLANS, TARGET, everything_read, upstream
from hawada.experiment.results import (
    Conclusion,
    EvaluateResult,
    ExportResult,
    FrontResult,
    ProfileResult,
    StageResult,
    TrainResult,
    result_from_json,
    to_json,
)

MANIFEST = "manifest.json"

REPLACED = "replaced.json"  # the manifest of a result that is being removed, so that its files are still known

ATTEMPT = "attempt.json"  # what a stage that resumes was begun with

ATTEMPT_MARK = "# Written by hawada, format 1, stage={stage}: the program replaces what it wrote in this folder.\n"

RESULT_KEYS = {field.name for field in fields(Conclusion)}  # of every result.json beside the stages' folders

ABSENT = object()  # in place of the value of a key that was not there yet


Result = TypeVar("Result", bound=StageResult)


class Run:
    """The directory of one experiment.

    A stage is finished when its folder has a manifest, which is written last and holds the SHA-256 of every file that
    the stage wrote and the config that it was handed. Only those files are ever removed: whatever else lies in a
    stage's folder belongs to the user, and so does a folder that neither has such a manifest nor was begun by a stage.

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
        self._settings: dict[str, DictConfig] = {}
        self._recorded: set[Path] = set()
        self._discarded: set[str] = set()

    def folder(self, stage: str) -> Path:
        """Where a stage writes."""
        if stage not in self._folders:
            sources = _sources(self.cfg, everything_read(stage, self.cfg)) if self.swept else ()
            touched = any(_overlap(key, source) for key in self.swept for source in sources)
            self._folders[stage] = (self.root if touched else self.shared) / stage
        return self._folders[stage]

    def is_finished(self, stage: str) -> bool:
        """Whether a stage's result is there and every file is as the manifest has it."""
        folder = self.folder(stage)
        manifest = _read_manifest(folder / MANIFEST, stage)
        if manifest is None or stage in self._discarded:
            return False
        files = manifest["files"]
        return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in files.items())

    def discard(self, stage: str) -> None:
        """Make a stage count as not finished in this run, until it is finished again.

        Raises:
            ValueError: as `check_replaceable`.
        """
        self.check_replaceable(stage)
        self._discarded.add(stage)

    def record(self, files: Iterable[Path]) -> None:
        """Take note of files that a stage wrote under names that its plan does not list."""
        self._recorded |= {path.absolute() for path in files}

    @overload
    def result(self, stage: Literal["profile"]) -> ProfileResult: ...
    @overload
    def result(self, stage: Literal["train"]) -> TrainResult: ...
    @overload
    def result(self, stage: Literal["export"]) -> ExportResult: ...
    @overload
    def result(self, stage: Literal["front"]) -> FrontResult: ...
    @overload
    def result(self, stage: Literal["evaluate"]) -> EvaluateResult: ...
    @overload
    def result(self, stage: str) -> StageResult: ...
    def result(self, stage: str) -> StageResult:
        """What a finished stage wrote.

        Raises:
            ValueError: when another version wrote it.
        """
        path = self.folder(stage) / "result.json"
        remedy = f"run stage={stage} with overwrite=true, or choose another name=..."
        result: StageResult = result_from_json(stage, json.loads(path.read_text()), place=str(path), remedy=remedy)
        return result

    def settings(self, stage: str) -> DictConfig:
        """The part of the configuration that a stage may read; anything else raises when it is read."""
        if stage not in self._settings:
            settings = OmegaConf.create()
            for key in PLANS[stage].reads:
                OmegaConf.update(settings, key, _plain(OmegaConf.select(self.cfg, key)))
            OmegaConf.set_struct(settings, True)
            OmegaConf.set_readonly(settings, True)
            self._settings[stage] = settings
        return self._settings[stage]

    def check(self, stage: str) -> bool:
        """Whether a stage is already done with this very configuration and from what is upstream of it now.

        Raises:
            ValueError: when its results, or those of a stage before it, came from another configuration or version, or
                when the stage is to be done and its folder holds what this program did not write.
        """
        if self.is_finished(stage):
            different = self.different_keys(stage)
            if different and not self.overwrite:
                raise ValueError(
                    f"{self.folder(stage)} holds results made with {_described(different)}; "
                    "choose another name=..., or set overwrite=true to replace them"
                )
            same = not different and self._manifest(stage)["upstream"] == self._upstream_now(stage)
            if same and self._can_be_read(stage):
                return True
        if not self._resumes(stage):
            self.check_replaceable(stage)
        return False

    def check_all(self, stages: Iterable[str]) -> None:
        """Check stages that will run one after the other, those included that become stale on the way.

        Raises:
            ValueError: as `check`.
        """
        redone: set[str] = set()
        for stage in stages:
            done = self.check(stage)
            if done and redone & set(upstream(stage, self.cfg)):
                self.check_replaceable(stage)
            if not done or redone & set(upstream(stage, self.cfg)):
                redone.add(stage)

    def check_replaceable(self, stage: str) -> None:
        """Check that a stage may write its folder anew: everything in there is its own.

        Raises:
            ValueError: naming a link, or a file that this program did not write.
        """
        folder = self.folder(stage)
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            kind = "link, and links are not followed" if folder.is_symlink() else "file"
            raise ValueError(
                f"stage={stage}: {folder} is a {kind}, where a folder of this program's own was expected; "
                "move it away, or choose another name=..."
            )
        foreign = self._contents(stage)[1]
        if foreign:
            raise ValueError(
                f"stage={stage}: {foreign[0]} was not written by this program, and nothing else was expected in "
                "a folder that is to be written anew; move it away, or choose another name=..."
            )

    def check_upstream(self, stage: str) -> None:
        """Check that every stage before this one is done, with this configuration.

        Raises:
            ValueError: naming the stage to run, or the keys that differ; also when an earlier stage's result is older
                than what it was made from.
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
            different = {key: value for key, value in different.items() if not key.startswith("measure.")}  # how long
            if different:
                raise ValueError(
                    f"stage={stage}: {earlier} ran with {_described(different)}; "
                    f"use the same values, another name=..., or run stage={earlier} overwrite=true first"
                )
            if self._manifest(earlier)["upstream"] != self._upstream_now(earlier):
                raise ValueError(
                    f"stage={stage}: what stage={earlier} was made from has changed since; "
                    f"run stage={earlier} again first"
                )

    @contextmanager
    def writing(self, stage: str) -> Iterator[Path]:
        """A stage's empty folder; what an unfinished or replaced attempt wrote there is removed first.

        Raises:
            ValueError: as `check_replaceable`; nothing is removed then.
        """
        folder = self.folder(stage)
        self.check_replaceable(stage)
        self._clear(stage)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", ATTEMPT_MARK.format(stage=stage) + OmegaConf.to_yaml(self.settings(stage)))
        yield folder

    @contextmanager
    def resuming(self, stage: str) -> Iterator[Path]:
        """A stage's folder with what an attempt left there that was broken off with this very configuration.

        Raises:
            ValueError: when the attempt had another configuration and `overwrite` is not set, and as `writing`.
        """
        folder = self.folder(stage)
        if not self._resumes(stage):
            with self.writing(stage):
                write_text(folder / ATTEMPT, json.dumps(self._attempt(stage), indent=1))
        yield folder

    def finish(self, stage: str, result: Result) -> Result:
        """Write a stage's result and then its manifest, which lists what the stage wrote and nothing else."""
        folder = self.folder(stage)
        write_json(folder / "result.json", to_json(result))
        files = {path.relative_to(folder).as_posix(): sha256(path) for path in self._contents(stage)[0]}
        write_json(
            folder / MANIFEST,
            {
                "program": "hawada",
                "stage": stage,
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "config": self._read_values(stage),
                "upstream": self._upstream_now(stage),
                "files": files,
            },
        )
        self._discarded.discard(stage)
        return result

    def conclude(self, result: Conclusion) -> None:
        """Write the experiment's result beside the stages' folders.

        Raises:
            ValueError: when a file of that name was not written by this program.
        """
        self._check_result()
        write_json(self.root / "result.json", to_json(result))

    def check_writable(self) -> None:
        """Check, without making anything, that the experiment's folder can be written.

        Raises:
            ValueError: naming the folder that cannot, or a result.json in it that this program did not write.
        """
        self._check_result()
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
        with ExitStack() as held:
            for folder in dict.fromkeys((self.shared, self.root)):
                lock = folder / ".lock"
                if lock.is_symlink() or (lock.exists() and not (lock.is_file() and lock.stat().st_size == 0)):
                    raise ValueError(
                        f"{lock} was not written by this program, whose locks are empty files; "
                        "move it away, or choose another name=..."
                    )
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    held.enter_context(FileLock(lock, timeout=0))
                except Timeout:
                    raise ValueError(
                        f"{folder} is in use by another run; wait for it, or choose another name=..."
                    ) from None
                except OSError as error:
                    raise ValueError(
                        f"output_dir: cannot write to {folder} ({error.strerror}); "
                        "set output_dir to a folder you may write"
                    ) from None
            yield

    def _contents(self, stage: str) -> tuple[list[Path], list[Path]]:
        """Files in a stage's folder that the stage wrote, and those that it did not; a link is nobody else's work.

        A manifest names every file of a finished result. Of an attempt that was broken off, the stage's plan tells.
        """
        folder = self.folder(stage)
        manifests = {name: _read_manifest(folder / name, stage) for name in (MANIFEST, REPLACED)}
        listed = {name for name, manifest in manifests.items() if manifest is not None}
        listed |= {name for manifest in manifests.values() if manifest is not None for name in manifest["files"]}
        begun = manifests[MANIFEST] is None and self._begun(stage)
        patterns = [name.split("/") for name in (*EVERY_STAGE_WRITES, *PLANS[stage].writes)] if begun else []
        own: list[Path] = []
        foreign: list[Path] = []
        for path in _walk(folder):
            parts = path.relative_to(folder).parts
            whole = [whole_name(part) for part in parts]
            written = (
                "/".join(parts) in listed
                or (begun and path.absolute() in self._recorded)
                or any(_matches(whole, pattern) for pattern in patterns)
                or (begun and whole == [MANIFEST] and parts != (MANIFEST,))
                or (path.name == "README.md" and is_signed(path))
            )
            (own if written and not path.is_symlink() else foreign).append(path)
        return own, foreign

    def _begun(self, stage: str) -> bool:
        """Whether an attempt of this stage is in its folder."""
        config = self.folder(stage) / "config.yaml"
        if self._unfinished_attempt(stage) is not None:
            return True
        try:
            return config.read_bytes().startswith(ATTEMPT_MARK.format(stage=stage).encode())
        except OSError:
            return False

    def _clear(self, stage: str) -> None:
        """Remove what a stage wrote. An interruption leaves no valid result, and what is left is known as the stage's.

        The mark of the attempt, or the list of the result's files, goes last.
        """
        folder = self.folder(stage)
        if _read_manifest(folder / MANIFEST, stage) is not None:
            os.replace(folder / MANIFEST, folder / REPLACED)
        last = [folder / ATTEMPT, folder / "config.yaml", folder / REPLACED]
        own = self._contents(stage)[0]
        for path in sorted(own, key=lambda path: (last.index(path) if path in last else -1, path)):
            path.unlink()
            for parent in path.parents:
                if parent == folder or any(parent.iterdir()):
                    break
                parent.rmdir()
        self._recorded = {path for path in self._recorded if not path.is_relative_to(folder.absolute())}

    def _attempt(self, stage: str) -> dict[str, Any]:
        """What a stage that resumes is begun with."""
        return {"config": self._read_values(stage), "upstream": self._upstream_now(stage)}

    def _unfinished_attempt(self, stage: str) -> dict[str, Any] | None:
        """What an attempt that can be resumed was begun with; None where there is none."""
        folder = self.folder(stage)
        attempt = _read_json(folder / ATTEMPT)
        if ATTEMPT not in PLANS[stage].writes or (folder / MANIFEST).is_file() or not isinstance(attempt, dict):
            return None
        return attempt if set(attempt) == {"config", "upstream"} else None

    def _resumes(self, stage: str) -> bool:
        """Whether a stage goes on from what an attempt with this very configuration left.

        Raises:
            ValueError: when there is an attempt with another configuration and it may not be replaced.
        """
        before = self._unfinished_attempt(stage)
        now = json.loads(json.dumps(self._attempt(stage)))
        if before is None or before == now:
            return before is not None
        if self.overwrite:
            return False
        changes = _changes(before["config"], now["config"])
        made = f"with {_described(changes)} (now {_described(_changes(now['config'], before['config']))})"
        if not changes:
            made = "from another result of " + " and ".join(f"stage={name}" for name in before["upstream"])
        raise ValueError(
            f"{self.folder(stage)} holds an unfinished stage={stage} that was begun {made}; "
            "use the same values, choose another name=..., or set overwrite=true to replace it"
        )

    def _can_be_read(self, stage: str) -> bool:
        """Whether a finished stage's result is one of this version's.

        Raises:
            ValueError: when it is not and may not be replaced.
        """
        try:
            self.result(stage)
        except ValueError:
            if not self.overwrite:
                raise
            return False
        return True

    def _check_result(self) -> None:
        path = self.root / "result.json"
        if not os.path.lexists(path):
            return
        result = _read_json(path)
        if path.is_symlink() or not (isinstance(result, dict) and set(result) >= RESULT_KEYS):
            raise ValueError(
                f"{path} was not written by this program, whose result would replace it; "
                "move it away, or choose another name=..."
            )

    def _manifest(self, stage: str) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.folder(stage) / MANIFEST).read_text())
        return manifest

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
        return _changes(self._manifest(stage)["config"], json.loads(json.dumps(self._read_values(stage))))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Keys whose value is another now, with the value before; `ABSENT` where there was no such key."""
    return {key: before.get(key, ABSENT) for key in sorted({*before, *now}) if before.get(key) != now.get(key)}


def _read_json(path: Path) -> Any:
    """What a file holds; None where it is no file that can be read as JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _read_manifest(path: Path, stage: str) -> dict[str, Any] | None:
    """A manifest that this program wrote for a stage; None for anything else of that name, links included."""
    record = None if path.is_symlink() else _read_json(path)
    if not isinstance(record, dict) or record.get("stage") != stage:
        return None
    return record if all(isinstance(record.get(key), dict) for key in ("config", "upstream", "files")) else None


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder but folders; a link is not followed, whatever it leads to."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path has the form that a plan gives; `*` does not reach across folders."""
    return len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern))


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
