"""The run directory as a stage sees it: its own folder, and what earlier stages left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from omegaconf import DictConfig

from hawada.core.files import write_json
from hawada.core.latency import environment
from hawada.experiment import Run
from hawada.experiment.results import Environment, to_json
from hawada.workspace.device import configured_device


class Store:
    """Folders and results of a run, and the machine that they are made on.

    Args:
        cfg: the part of the configuration that the stage reads.
        run: the run directory.
    """

    def __init__(self, cfg: DictConfig, run: Run) -> None:
        self.cfg, self.run = cfg, run

    def folder(self, stage: str) -> Path:
        """Where a stage writes."""
        return self.run.folder(stage)

    def record(self, files: Iterable[Path]) -> None:
        """Take note of files that this stage wrote under names that its plan does not list."""
        self.run.record(files)

    @contextmanager
    def writing(self, stage: str) -> Iterator[Path]:
        """The stage's empty folder, with its configuration and a record of the environment."""
        with self.run.writing(stage) as folder:
            write_json(folder / "environment.json", to_json(self.environment))
            yield folder

    @cached_property
    def environment(self) -> Environment:
        """Machine and versions."""
        return Environment(**environment(configured_device(self.cfg.gpu)))

    def profiled_handover_us(self) -> float | None:
        """How near to each other the threads of a CPU ran when the teacher was profiled with as many of them.

        None where it was not, and a stage that does not need the profile goes on without it.
        """
        try:
            profile = self.run.result("profile") if self.run.is_finished("profile") else None
        except ValueError:  # another version's
            return None
        if profile is None or profile.environment.fingerprint.get("threads") != torch.get_num_threads():
            return None
        return profile.handover_us
