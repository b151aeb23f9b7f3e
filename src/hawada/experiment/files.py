"""Files written whole or not at all, and their checksums."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hawada.core.files import partial_path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = partial_path(path)
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(record, indent=1) + "\n")
