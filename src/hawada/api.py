"""HawAda in Python: what programs of one's own call, without the command and without Hydra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def load(path: str | Path, trust: Sequence[str] = ()) -> nn.Module:
    """Load a model that a run saved (`teacher` or `slim`) as a plain module in eval mode on the CPU.

    Args:
        path: the folder that `result.json` names.
        trust: package prefixes (`"mypackage."`) of adapters of your own that may be imported.

    Raises:
        ValueError: when the folder is not a saved model, is damaged, or names an adapter that is not trusted.
    """
    from hawada.adapters import load_model

    return load_model(Path(path), trust)
