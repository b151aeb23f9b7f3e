"""One job of a command: a single run, or one of a multirun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hawada.experiment.results import StageResult


@dataclass(frozen=True)
class Job:
    """What became of a job.

    Attributes:
        overrides: the values that were given on the command line, by key.
        result: what the last stage found out, or None where nothing did.
        error: why it failed, or None.
    """

    overrides: Mapping[str, str]
    result: StageResult | None
    error: Exception | None
