"""Predicted milliseconds: a proxy over site tables, calibrated on whole sliced models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from scipy.optimize import nnls
from scipy.stats import kendalltau
from torch import Tensor

from hawada.core.export import ExportPolicy
from hawada.core.site_table import LatencyTable, SoftWidths
from hawada.core.structure import Group, Keep, Widths, keep_first


class Proxy(Protocol):
    """What training and search need of a latency proxy, whatever it is made of."""

    def predict(self, widths: SoftWidths) -> Tensor:
        """Milliseconds for the widths of every group: a scalar, differentiable in soft widths."""
        ...

    def add_sample(self, widths: Mapping[str, int], ms: float, weight: float = 1.0) -> None:
        """Take in one measured model."""
        ...

    def state(self) -> dict[str, Any]:
        """What it has learned, for JSON."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        ...


class LatencyProxy:
    """milliseconds = overhead + sum over sites of scale[kind] * table(widths).

    Overhead and scales come from non-negative least squares on whole sliced models, with a weak pull of the scales
    towards 1 (sites timed alone do not add up to the model). Every figure that is measured later joins the fit.

    Args:
        table: site times.
        pull: weight of the pull towards scale 1, relative to one sample.
    """

    def __init__(self, table: LatencyTable, pull: float = 0.05) -> None:
        self.table = table
        self.pull = pull
        self.kinds = sorted({entry.site.kind for entry in table.sites})
        self.overhead = 0.0
        self.scales = dict.fromkeys(self.kinds, 1.0)
        self.samples: list[tuple[dict[str, int], float, float]] = []
        self._known: dict[tuple[int, ...], float] = {}  # the search asks for the same whole widths again and again

    def predict(self, widths: SoftWidths) -> Tensor:
        """Milliseconds for soft or hard widths (every group present): a float64 scalar, differentiable."""
        total = torch.tensor(self.overhead, dtype=torch.float64)
        for index, entry in enumerate(self.table.sites):
            total = total + self.scales[entry.site.kind] * self._site_ms(index, widths)
        return total

    def _site_ms(self, index: int, widths: SoftWidths) -> Tensor | float:
        """A site's table time; remembered for whole widths."""
        entry = self.table.sites[index]
        own = [widths[name] for name in entry.site.groups]
        if not all(isinstance(width, int) for width in own):
            return entry.interpolate(widths)
        key = (index, *(int(width) for width in own))
        if key not in self._known:
            self._known[key] = float(entry.interpolate(widths))
        return self._known[key]

    def add_sample(self, widths: Mapping[str, int], ms: float, weight: float = 1.0) -> None:
        """Add one measured sliced model and fit again."""
        self.samples.append((dict(widths), float(ms), float(weight)))
        rows, targets = [], []
        for sample_widths, sample_ms, sample_weight in self.samples:
            features = self._features(sample_widths)
            rows.append(np.asarray([1.0, *features]) * sample_weight / sample_ms)  # relative errors
            targets.append(sample_weight)
        for index in range(len(self.kinds)):
            row = np.zeros(1 + len(self.kinds))
            row[1 + index] = self.pull
            rows.append(row)
            targets.append(self.pull)
        solution, _ = nnls(np.asarray(rows), np.asarray(targets))
        self.overhead = float(solution[0])
        self.scales = {kind: float(scale) for kind, scale in zip(self.kinds, solution[1:], strict=True)}

    def _features(self, widths: SoftWidths) -> list[float]:
        """Sum of the site times of each kind."""
        sums = dict.fromkeys(self.kinds, 0.0)
        for index, entry in enumerate(self.table.sites):
            sums[entry.site.kind] += float(self._site_ms(index, widths))
        return [sums[kind] for kind in self.kinds]

    def state(self) -> dict[str, Any]:
        """The fit and its samples, for JSON."""
        return {"overhead": self.overhead, "scales": self.scales, "samples": [list(sample) for sample in self.samples]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.overhead = float(state["overhead"])
        self.scales = dict(state["scales"])
        self.samples = [(dict(widths), float(ms), float(weight)) for widths, ms, weight in state["samples"]]


def fidelity(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float | int | None]:
    """How well a proxy predicts models it was not fitted on.

    Returns:
        `mape` (mean absolute error relative to the measurement), `kendall_tau` (None below two samples), `samples`.
    """
    p, m = np.asarray(predicted), np.asarray(measured)
    tau = float(kendalltau(p, m).statistic) if len(p) > 1 else None
    return {"mape": float(np.mean(np.abs(p - m) / m)), "kendall_tau": tau, "samples": len(p)}


def random_keep(groups: Sequence[Group], policy: ExportPolicy, random: np.random.Generator) -> Keep:
    """Kept indices of a random model: a density for the whole, widths around it, allowed widths only."""
    density = random.uniform(0.05, 1.0)
    widths: Widths = {}
    for members in policy.shared(groups):
        if members[0].removes:
            width = int(random.random() < 0.4 + 0.6 * density)
        else:
            wanted = members[0].full_width * np.clip(random.normal(density, 0.2), 0.0, 1.0)
            width = min(policy.widths(members[0]), key=lambda choice: abs(choice - wanted))
        widths |= dict.fromkeys((member.name for member in members), width)
    branches = [group.name for group in groups if group.removes]
    widths = policy.restored(widths, groups, [branches[index] for index in random.permutation(len(branches))])
    return keep_first(groups, widths)
