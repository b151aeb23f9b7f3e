"""Layers that keep units against what one would expect, with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class KeptWhole:
    """A layer some or all of whose units cannot go.

    Attributes:
        module: The path of the layer.
        kind: The name of its class.
        units: The number of its output channels that stay.
        reason: What keeps them, as the end of a sentence that begins with them.
        remedy: What would free them, as an imperative; "" where nothing is wrong, as with the outputs of a model.
    """

    module: str
    kind: str
    units: int
    reason: str
    remedy: str


def summarize_kept(kept: Iterable[KeptWhole]) -> list[str]:
    """Tell in one sentence for each class of layers, reason and remedy how many keep their units, most units first.

    What has no remedy because nothing is wrong is left out.
    """
    alike: dict[tuple[str, str, str], list[KeptWhole]] = {}
    for layer in kept:
        if layer.remedy:
            alike.setdefault((layer.kind, layer.reason, layer.remedy), []).append(layer)
    told = sorted(alike.items(), key=lambda item: -sum(layer.units for layer in item[1]))
    return [
        f"{len(layers)} {kind} {'layer keeps' if len(layers) == 1 else 'layers keep'} "
        f"{sum(layer.units for layer in layers):,} channels, which {reason}; {remedy}"
        for (kind, reason, remedy), layers in told
    ]
