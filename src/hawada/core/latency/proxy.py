"""Predicted milliseconds: a proxy over site tables, calibrated on whole sliced models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import kendalltau
from torch import Tensor

from hawada.core.latency.clock import Clock
from hawada.core.latency.profiler import TINY_MS
from hawada.core.latency.site_table import LatencyTable, SiteTable, SoftWidths
from hawada.core.structure import ExportPolicy, Group, Keep, Widths, keep_first


@dataclass(frozen=True)
class Term:
    """A part of the predicted time.

    Attributes:
        groups: names of the groups whose widths it depends on.
        milliseconds: called with an array of widths for each of them, all of one shape; returns such an array.
    """

    groups: tuple[str, ...]
    milliseconds: Callable[..., NDArray[np.float64] | float]


ROBUST_FITS = 10
OFF = 0.01  # a sample that is off by less than this relative error is never an outlier


class Proxy(Protocol):
    """What training and search need of a latency proxy, whatever it is made of."""

    def predict(self, widths: SoftWidths) -> Tensor:
        """Milliseconds for the widths of every group: a scalar, differentiable in soft widths."""
        ...

    def terms(self) -> Sequence[Term]:
        """What the prediction is the sum of, for the allocation."""
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
    towards one another (sites timed alone do not add up to the model). Every figure that is measured later joins the
    fit; a measurement that all others contradict counts for little (Holland and Welsch, Robust regression using
    iteratively reweighted least-squares, 1977).

    Args:
        table: site times.
        pull: weight of the pull towards a common scale, relative to one sample.
        clock: what the table is made with (`stage=profile` asks the configuration); None means the device's own.
    """

    def __init__(self, table: LatencyTable, pull: float = 0.05, clock: Clock | None = None) -> None:
        self.table, self.clock = table, clock
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

    def terms(self) -> list[Term]:
        """The overhead, and every site by the scale of its kind."""

        def scaled(entry: SiteTable) -> Callable[..., NDArray[np.float64]]:
            return lambda *widths: self.scales[entry.site.kind] * entry.at(*widths)

        overhead = Term((), lambda: self.overhead)
        return [overhead, *(Term(entry.site.groups, scaled(entry)) for entry in self.table.sites)]

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
        self._fit()

    def _fit(self) -> None:
        """Non-negative least squares of relative errors, each sample weighted down by how far it lies off."""
        features = np.asarray([self._features(widths) for widths, _, _ in self.samples])  # (samples, kinds)
        ms = np.asarray([sample_ms for _, sample_ms, _ in self.samples])
        weights = np.asarray([weight for _, _, weight in self.samples])
        common = float(np.median(ms / np.maximum(features.sum(axis=1), TINY_MS)))
        rows = np.hstack([np.ones((len(ms), 1)), features]) / ms[:, None]  # times the solution: predicted / measured
        pull = self.pull / common * np.eye(1 + len(self.kinds))[1:]
        trust = np.ones(len(ms))
        for _ in range(ROBUST_FITS):
            strength = weights * trust
            solution, _ = nnls(
                np.vstack([rows * strength[:, None], pull]), np.append(strength, np.full(len(pull), self.pull))
            )
            off = np.abs(rows @ solution - 1)
            trust = np.minimum(1.0, max(3 * float(np.median(off)), OFF) / np.maximum(off, TINY_MS))
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


def calibrate(proxy: Proxy, samples: Sequence[tuple[Widths, float]], fitted: int) -> tuple[list[float], list[float]]:
    """Fit a proxy on the first `fitted` measured models, predict the others unseen, and then let it have them too.

    Args:
        proxy: without samples.
        samples: (widths, milliseconds).
        fitted: how many are fitted before the others are predicted.

    Returns:
        Predicted and measured milliseconds of the unseen models.
    """
    for widths, ms in samples[:fitted]:
        proxy.add_sample(widths, ms)
    predicted = [float(proxy.predict(widths)) for widths, _ in samples[fitted:]]
    for widths, ms in samples[fitted:]:
        proxy.add_sample(widths, ms)
    return predicted, [ms for _, ms in samples[fitted:]]


def fidelity(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float | int | None]:
    """How well a proxy predicts models it was not fitted on.

    Returns:
        `mape` (mean absolute error relative to the measurement), `kendall_tau` (None below two samples), `samples`.
    """
    p, m = np.asarray(predicted), np.asarray(measured)
    tau = float(kendalltau(p, m).statistic) if len(p) > 1 else None
    return {"mape": float(np.mean(np.abs(p - m) / m)), "kendall_tau": tau, "samples": len(p)}


def random_keep(
    groups: Sequence[Group], policy: ExportPolicy, random: np.random.Generator, *, around_density: bool = False
) -> Keep:
    """Kept indices of a random model: every allowed width is as likely as the others.

    Args:
        groups: every group.
        policy: allowed widths.
        random: source of randomness.
        around_density: widths lie around a density that is drawn for the whole model, so that such models spread over
            the whole range of latencies; sums of independent widths do not.
    """
    density = random.uniform(0.05, 1.0)
    staying = 0.4 + 0.6 * density if around_density else random.uniform(0.0, 1.0)
    widths: Widths = {}
    for members in policy.shared(groups):
        allowed = policy.widths(members[0])
        if members[0].removes:
            width = int(random.random() < staying)
        elif around_density:
            wanted = members[0].full_width * np.clip(random.normal(density, 0.2), 0.0, 1.0)
            width = min(allowed, key=lambda choice: abs(choice - wanted))
        else:
            width = int(random.choice(allowed))
        widths |= dict.fromkeys((member.name for member in members), width)
    branches = [group.name for group in groups if group.removes]
    widths = policy.with_required_branches(
        widths, groups, [branches[index] for index in random.permutation(len(branches))]
    )
    return keep_first(groups, widths)
