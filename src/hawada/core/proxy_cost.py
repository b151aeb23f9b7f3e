"""Predicted milliseconds: site tables from really sliced modules, and a proxy calibrated on whole sliced models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, nnls
from scipy.stats import kendalltau
from torch import Tensor, nn

from hawada.core.export import ExportPolicy, materialize
from hawada.core.profiler import Clock, Inputs, Rounds, relative_medians
from hawada.core.structure import Group, Keep, Site, keep_all, without_orphans

SoftWidths = Mapping[str, Tensor | float | int]


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


@dataclass(frozen=True)
class SiteTable:
    """Times of one site over a grid of widths.

    Attributes:
        site: which module, touched by which groups.
        grid: for each of `site.groups`, the widths that were measured, ascending.
        ms: milliseconds, one axis per group.
    """

    site: Site
    grid: tuple[tuple[int, ...], ...]
    ms: NDArray[np.float64]

    def interpolate(self, widths: SoftWidths) -> Tensor:
        """Multilinear in the widths, constant outside the grid; differentiable; a float64 scalar."""
        values = torch.as_tensor(self.ms, dtype=torch.float64)
        for name, points in zip(self.site.groups, self.grid, strict=True):
            axis = torch.tensor(points, dtype=torch.float64)
            width = torch.as_tensor(widths[name]).cpu().double().clamp(axis[0], axis[-1])
            if len(points) == 1:
                values = values[0]
                continue
            right = int(torch.searchsorted(axis, width.detach()).clamp(1, len(points) - 1))
            share = (width - axis[right - 1]) / (axis[right] - axis[right - 1])
            values = values[right - 1] + share * (values[right] - values[right - 1])  # drops the first axis
        return values


class LatencyTable:
    """One `SiteTable` per site. Rows are monotone: a stair stays a stair, but a wider site is never cheaper."""

    def __init__(self, sites: Sequence[SiteTable]) -> None:
        self.sites = tuple(sites)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "sites": [
                {
                    "module": table.site.module,
                    "groups": list(table.site.groups),
                    "kind": table.site.kind,
                    "grid": [list(points) for points in table.grid],
                    "ms": table.ms.tolist(),
                }
                for table in self.sites
            ]
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LatencyTable:
        """The inverse of `as_dict`."""
        return cls(
            [
                SiteTable(
                    Site(entry["module"], tuple(entry["groups"]), entry["kind"]),
                    tuple(tuple(points) for points in entry["grid"]),
                    np.asarray(entry["ms"], dtype=np.float64),
                )
                for entry in record["sites"]
            ]
        )


def build_table(
    model: nn.Module,
    groups: Sequence[Group],
    sites: Sequence[Site],
    inputs: Inputs,
    clock: Clock,
    *,
    policy: ExportPolicy,
    points: int = 9,
    rounds: Rounds | None = None,
    on_site: Callable[[str], None] | None = None,
) -> LatencyTable:
    """Slice a copy of each distinct site to a grid of widths and time it on the inputs it really gets.

    Sites of the same architecture and input shape share one measurement.

    Args:
        model: teacher or skeleton, in eval mode on the device that is timed.
        groups: its declaration.
        sites: what to time.
        inputs: of the whole model, on the same device.
        clock: takes the time.
        policy: its rounding decides which widths exist.
        points: grid points per group with many units (fewer when several groups touch a site).
        rounds: how long to measure.
        on_site: called with each site's path when it is done.
    """
    by_name = {group.name: group for group in groups}
    captured = _capture_inputs(model, [site.module for site in sites], inputs)
    measured: dict[tuple[Any, ...], NDArray[np.float64]] = {}
    tables = []
    for site in sites:
        members = [by_name[name] for name in site.groups]
        inner = sum(1 for group in members if not group.removes)
        count = points if inner <= 1 else max(3, points // 2 + 1)
        grid = tuple(_grid(policy.widths(group), count) for group in members)
        module = model.get_submodule(site.module)
        signature = (repr(module), tuple(tuple(x.shape) for x in captured[site.module]), grid)
        if signature not in measured:
            measured[signature] = _time_grid(
                model, groups, site, grid, captured[site.module], clock, rounds or Rounds()
            )
        tables.append(SiteTable(site, grid, measured[signature]))
        if on_site is not None:
            on_site(site.module)
    return LatencyTable(tables)


def _grid(widths: Sequence[int], count: int) -> tuple[int, ...]:
    """At most `count` of the allowed widths, evenly spread, both ends among them."""
    picks = np.linspace(0, len(widths) - 1, min(count, len(widths))).round().astype(int)
    return tuple(widths[pick] for pick in sorted(set(picks.tolist())))


def _capture_inputs(model: nn.Module, paths: Sequence[str], inputs: Inputs) -> dict[str, Inputs]:
    """What each module is called with in one forward pass of the whole model."""
    captured: dict[str, Inputs] = {}

    def capture(path: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            captured[path] = tuple(x.clone() for x in args if isinstance(x, Tensor))

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(capture(path)) for path in paths]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return captured


def _time_grid(
    model: nn.Module,
    groups: Sequence[Group],
    site: Site,
    grid: Sequence[Sequence[int]],
    inputs: Inputs,
    clock: Clock,
    rounds: Rounds,
) -> NDArray[np.float64]:
    """Milliseconds at every grid point; points that slice to the same module are timed once."""
    full = keep_all(groups)
    points: dict[tuple[int, ...], tuple[int, ...]] = {}  # grid widths -> widths that remain once parents are gone
    models: dict[str, nn.Module] = {}
    for widths in itertools.product(*[reversed(axis) for axis in grid]):  # the full width comes first: the baseline
        keep: Keep = full | {name: tuple(range(width)) for name, width in zip(site.groups, widths, strict=True)}
        keep = without_orphans(keep, groups)
        points[widths] = tuple(len(keep[name]) for name in site.groups)
        if str(points[widths]) not in models:
            models[str(points[widths])] = materialize(model, groups, keep, prefix=site.module)
    times = relative_medians(models, dict.fromkeys(models, inputs), clock, rounds)
    ms = np.asarray([times[str(points[widths])] for widths in itertools.product(*grid)])
    return _monotone(ms.reshape([len(axis) for axis in grid]))


def _monotone(ms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least-squares isotonic along each axis, then a running maximum, which restores all axes at once."""
    for axis in range(ms.ndim):
        ms = np.apply_along_axis(lambda row: isotonic_regression(row).x, axis, ms)
    for axis in range(ms.ndim):
        ms = np.maximum.accumulate(ms, axis=axis)
    return ms


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
    keep: Keep = {}
    for group in groups:
        if group.removes:
            keep[group.name] = (0,) if random.random() < 0.4 + 0.6 * density else ()
        else:
            width = group.units * np.clip(random.normal(density, 0.2), 0.0, 1.0)
            choices = policy.widths(group)
            count = min(choices, key=lambda choice: abs(choice - width))
            keep[group.name] = tuple(range(count))
    return without_orphans(keep, groups)
