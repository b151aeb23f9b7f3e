"""Figures that take long, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hawada.core.files import write_json


class Kept:
    """Figures by name in a file, so that a call that finds them there does not take them again.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.figures: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def take(self, name: str, figure: Callable[[], Any]) -> Any:
        """What the file has under this name, or else what is computed and written there."""
        if name not in self.figures:
            self.figures[name] = figure()
            write_json(self.path, self.figures)
        return self.figures[name]
