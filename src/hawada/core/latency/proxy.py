"""Predicted milliseconds: a proxy over site tables, fitted to measurements of whole sliced models."""

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
        groups: the names of the groups whose widths it depends on.
        milliseconds: a function of one array of widths per group, all of one shape, that returns such an array.
    """

    groups: tuple[str, ...]
    milliseconds: Callable[..., NDArray[np.float64] | float]


REWEIGHTING_STEPS = 10  # fits, each of which trusts the samples by their errors in the one before
MIN_OUTLIER_ERROR = 0.01  # A sample with a smaller relative error is never taken for an outlier.


class Proxy(Protocol):
    """What training and search need of a latency proxy, whatever it is made of."""

    def predict(self, widths: SoftWidths) -> Tensor:
        """Predict the milliseconds for the widths of every group: a scalar, differentiable in soft widths."""
        ...

    def terms(self) -> Sequence[Term]:
        """Return the parts whose sum is the prediction; the allocation needs them."""
        ...

    def add_sample(self, widths: Mapping[str, int], ms: float, weight: float = 1.0) -> None:
        """Add one measured model to the fit."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what was fitted, as JSON types."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        ...


class LatencyProxy:
    """Predicts milliseconds = overhead + sum over sites of scale[kind] * table(widths).

    Overhead and scales are fitted by non-negative least squares to whole sliced models, with a weak pull of the scales
    towards one another (sites timed alone do not add up to the model). Every figure that is measured later joins the
    fit; a measurement that all others contradict has little weight (Holland and Welsch, Robust regression using
    iteratively reweighted least-squares, 1977).

    Args:
        table: the times of the sites.
        pull: the weight of the pull towards a common scale, relative to one sample.
        clock: the clock that `stage=profile` measures the table with; None means the device's own.
    """

    def __init__(self, table: LatencyTable, pull: float = 0.05, clock: Clock | None = None) -> None:
        self.table, self.clock = table, clock
        self.pull = pull
        self.kinds = sorted({entry.site.kind for entry in table.sites})
        self.overhead = 0.0
        self.scales = dict.fromkeys(self.kinds, 1.0)
        self.samples: list[tuple[dict[str, int], float, float]] = []
        self._known: dict[tuple[int, ...], float] = {}  # the search asks for the same whole widths many times

    def predict(self, widths: SoftWidths) -> Tensor:
        """Predict the milliseconds for soft or hard widths of every group: a float64 scalar, differentiable."""
        total = torch.tensor(self.overhead, dtype=torch.float64)
        for index, entry in enumerate(self.table.sites):
            total = total + self.scales[entry.site.kind] * self._site_ms(index, widths)
        return total

    def terms(self) -> list[Term]:
        """Return the overhead, and the time of every site times the scale of its kind."""

        def scaled(entry: SiteTable) -> Callable[..., NDArray[np.float64]]:
            return lambda *widths: self.scales[entry.site.kind] * entry.at(*widths)

        overhead = Term((), lambda: self.overhead)
        return [overhead, *(Term(entry.site.groups, scaled(entry)) for entry in self.table.sites)]

    def _site_ms(self, index: int, widths: SoftWidths) -> Tensor | float:
        """Look up a site's time in its table; for whole widths the result is cached."""
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
        """Fit relative errors by non-negative least squares; samples with large errors lose weight step by step."""
        features = np.asarray([self._sums_by_kind(widths) for widths, _, _ in self.samples])  # (samples, kinds)
        ms = np.asarray([sample_ms for _, sample_ms, _ in self.samples])
        weights = np.asarray([weight for _, _, weight in self.samples])
        common = float(np.median(ms / np.maximum(features.sum(axis=1), TINY_MS)))
        rows = np.hstack([np.ones((len(ms), 1)), features]) / ms[:, None]  # times the solution: predicted / measured
        pull = self.pull / common * np.eye(1 + len(self.kinds))[1:]
        trust = np.ones(len(ms))
        for _ in range(REWEIGHTING_STEPS):
            strength = weights * trust
            solution, _ = nnls(
                np.vstack([rows * strength[:, None], pull]), np.append(strength, np.full(len(pull), self.pull))
            )
            errors = np.abs(rows @ solution - 1)
            largest_trusted = max(3 * float(np.median(errors)), MIN_OUTLIER_ERROR)
            trust = np.minimum(1.0, largest_trusted / np.maximum(errors, TINY_MS))
        self.overhead = float(solution[0])
        self.scales = {kind: float(scale) for kind, scale in zip(self.kinds, solution[1:], strict=True)}

    def _sums_by_kind(self, widths: SoftWidths) -> list[float]:
        """Sum the times of the sites of each kind."""
        sums = dict.fromkeys(self.kinds, 0.0)
        for index, entry in enumerate(self.table.sites):
            sums[entry.site.kind] += float(self._site_ms(index, widths))
        return [sums[kind] for kind in self.kinds]

    def state(self) -> dict[str, Any]:
        """Return the fit and its samples, as JSON types."""
        return {"overhead": self.overhead, "scales": self.scales, "samples": [list(sample) for sample in self.samples]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.overhead = float(state["overhead"])
        self.scales = dict(state["scales"])
        self.samples = [(dict(widths), float(ms), float(weight)) for widths, ms, weight in state["samples"]]


def calibrate(proxy: Proxy, samples: Sequence[tuple[Widths, float]], fitted: int) -> tuple[list[float], list[float]]:
    """Fit a proxy to the first `fitted` measured models, predict the others unseen, and then fit it to these too.

    Args:
        proxy: a proxy without samples.
        samples: the measured models, as (widths, milliseconds).
        fitted: how many models are fitted before the others are predicted.

    Returns:
        The predicted and the measured milliseconds of the unseen models.
    """
    for widths, ms in samples[:fitted]:
        proxy.add_sample(widths, ms)
    predicted = [float(proxy.predict(widths)) for widths, _ in samples[fitted:]]
    for widths, ms in samples[fitted:]:
        proxy.add_sample(widths, ms)
    return predicted, [ms for _, ms in samples[fitted:]]


def fidelity(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, Any]:
    """Compare predictions with measurements of models that the proxy was not fitted to.

    Returns:
        `mape` (mean absolute error relative to the measurement), `kendall_tau` (None below two samples), `samples`.
    """
    p, m = np.asarray(predicted), np.asarray(measured)
    tau = float(kendalltau(p, m).statistic) if len(p) > 1 else None
    return {"mape": float(np.mean(np.abs(p - m) / m)), "kendall_tau": tau, "samples": len(p)}


def random_keep(
    groups: Sequence[Group], policy: ExportPolicy, random: np.random.Generator, *, around_density: bool = False
) -> Keep:
    """Draw the kept indices of a random model, in which every allowed width is as likely as the others.

    Args:
        groups: every group of the model.
        policy: the policy of allowed widths.
        random: the source of randomness.
        around_density: draw the widths around a density that is drawn for the whole model, so that such models spread
            over the whole range of latencies; with independent widths they would lie close together.
    """
    density = random.uniform(0.05, 1.0)
    staying = 0.4 + 0.6 * density if around_density else random.uniform(0.0, 1.0)
    widths: Widths = {}
    for members in policy.shared(groups):
        allowed = policy.widths(members[0])
        if members[0].removes:
            width = int(random.random() < staying)
        elif around_density:
            drawn = members[0].full_width * np.clip(random.normal(density, 0.2), 0.0, 1.0)
            width = min(allowed, key=lambda choice: abs(choice - drawn))
        else:
            width = int(random.choice(allowed))
        widths |= dict.fromkeys((member.name for member in members), width)
    branches = [group.name for group in groups if group.removes]
    widths = policy.with_required_branches(
        widths, groups, [branches[index] for index in random.permutation(len(branches))]
    )
    return keep_first(groups, widths)
