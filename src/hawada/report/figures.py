"""How single figures are written in tables, cards and sentences."""

from __future__ import annotations

from hawada.core.verdict import Interval


def format_interval(interval: Interval, digits: str = ".3g") -> str:
    """Write a median with its interval, as `median [low, high]`.

    Args:
        interval: the median with its interval.
        digits: the format of each number.
    """
    return f"{interval.median:{digits}} [{interval.low:{digits}}, {interval.high:{digits}}]"


def format_quality(metric: str, value: float) -> str:
    """Write a quality as people are used to it: an accuracy in percent, a perplexity as it is."""
    return f"{value:.2%}" if metric in ("accuracy", "mean_iou", "map_50", "agreement") else f"{value:.4g}"
