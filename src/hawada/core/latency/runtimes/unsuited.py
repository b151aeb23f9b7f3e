"""The error for a model that cannot be run in a runtime."""

from __future__ import annotations

from torch import nn


def unsuited(model: nn.Module, attempt: str, error: Exception) -> ValueError:
    """Make the error to raise when a runtime refuses a model.

    Args:
        model: the model that was refused.
        attempt: what failed, as a participle that follows "cannot be".
        error: the runtime's error; the first line of its message is repeated.
    """
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return ValueError(f"runtime: {type(model).__name__} cannot be {attempt} ({reason}); use runtime=eager")
