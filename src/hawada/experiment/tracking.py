"""The log of a run's metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hawada.core.files import write_text


class MetricsLog:
    """One JSON object a line, appended and flushed as it happens."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def keep(self, kept: Callable[[dict[str, Any]], bool]) -> None:
        """Drop every other record, such as those that a run wrote after its last checkpoint."""
        if self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
            write_text(self.path, "".join(line for line in lines if line.endswith("\n") and kept(json.loads(line))))
