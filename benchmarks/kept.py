"""Figures that take long to compute, cached in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hawada.core.files import write_json


class Kept:
    """Caches figures by name in a file, so that a later call does not compute them again.

    Args:
        path: the path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.figures: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def take(self, name: str, figure: Callable[[], Any]) -> Any:
        """Return the figure of this name in the file, or else compute it and write it there."""
        if name not in self.figures:
            self.figures[name] = figure()
            write_json(self.path, self.figures)
        return self.figures[name]
