"""What a stage begins with."""

from __future__ import annotations

from omegaconf import DictConfig

from hawada.experiment import Run
from hawada.workspace.device import prepare
from hawada.workspace.stopwatch import ModelStopwatch
from hawada.workspace.store import Store
from hawada.workspace.subject import Subject


def open_stage(cfg: DictConfig, run: Run) -> tuple[Subject, ModelStopwatch, Store]:
    """Set threads and seed, and make what a stage works with; nothing is loaded before it is asked for.

    Args:
        cfg: the part of the configuration that the stage reads.
        run: the run directory.
    """
    prepare(cfg)
    store = Store(cfg, run)
    subject = Subject(cfg, store)
    return subject, ModelStopwatch(cfg, store, subject), store
