"""Why a model cannot be run in a runtime."""

from __future__ import annotations

from torch import nn


def unsuited(model: nn.Module, attempt: str, error: Exception) -> ValueError:
    """The error to raise when a runtime refuses a model.

    Args:
        model: what was tried.
        attempt: what failed, as in "cannot be ...".
        error: what the runtime raised; the first line of its message is repeated.
    """
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return ValueError(f"runtime: {type(model).__name__} cannot be {attempt} ({reason}); use runtime=eager")
