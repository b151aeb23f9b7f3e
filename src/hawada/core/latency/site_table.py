"""Latency tables: the times of single sites over a grid of widths, measured on really sliced modules."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hawada.core.latency.clock import Clock
from hawada.core.latency.monitor import Monitor
from hawada.core.latency.profiler import Rounds, relative_medians
from hawada.core.structure import (
    ExportPolicy,
    Group,
    Inputs,
    Site,
    SliceSite,
    full_widths,
    keep_first,
    materialize,
    widths_of,
)

SoftWidths = Mapping[str, Tensor | float | int]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


@dataclass(frozen=True)
class SiteTable:
    """Times of one site over a grid of widths.

    Attributes:
        site: the module that is timed, with the groups that change its shape.
        grid: for each of `site.groups`, the widths that were measured, ascending.
        ms: the milliseconds at every grid point, with one axis for each group.
    """

    site: Site
    grid: tuple[tuple[int, ...], ...]
    ms: NDArray[np.float64]

    def interpolate(self, widths: SoftWidths) -> Tensor:
        """Predict the site's milliseconds: multilinear in the widths, constant outside the grid, differentiable.

        Args:
            widths: the width of every group of the site, soft (a tensor) or hard.

        Returns:
            A float64 scalar.
        """
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

    def at(self, *widths: NDArray[np.float64]) -> NDArray[np.float64]:
        """Interpolate as `interpolate` does, for one array of widths per group of the site, all of one shape."""
        result = np.zeros(np.shape(widths[0]))
        # By axis: the left neighbour of each width, and the share of the right one.
        corners: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
        for points, asked in zip(self.grid, widths, strict=True):
            axis = np.asarray(points, dtype=np.float64)
            inside = np.clip(asked, axis[0], axis[-1])
            left = np.clip(np.searchsorted(axis, inside) - 1, 0, max(len(points) - 2, 0))
            step = np.diff(axis, append=axis[-1] + 1)[left]
            corners.append((left, (inside - axis[left]) / step))
        for right in itertools.product((0, 1), repeat=len(corners)):
            share = np.ones_like(result)
            index = []
            for side, (left, part), points in zip(right, corners, self.grid, strict=True):
                share = share * (part if side else 1 - part)
                index.append(np.minimum(left + side, len(points) - 1))
            result = result + share * self.ms[tuple(index)]
        return result


class LatencyTable:
    """One `SiteTable` for each site. Times are monotone: a stair stays a stair, but a wider site is never faster."""

    def __init__(self, sites: Sequence[SiteTable]) -> None:
        self.sites = tuple(sites)

    def as_dict(self) -> dict[str, Any]:
        """Return the table as JSON types; `from_dict` reads it back."""
        return {
            "sites": [
                {
                    "module": table.site.module,
                    "groups": list(table.site.groups),
                    "kind": table.site.kind,
                    "reads": table.site.reads,
                    "reads_dim": table.site.reads_dim,
                    "reads_per_unit": table.site.reads_per_unit,
                    "grid": [list(points) for points in table.grid],
                    "ms": table.ms.tolist(),
                }
                for table in self.sites
            ]
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LatencyTable:
        """Make the table that `as_dict` described."""
        return cls(
            [
                SiteTable(
                    Site(
                        entry["module"],
                        tuple(entry["groups"]),
                        entry["kind"],
                        tuple(entry["reads"]) if isinstance(entry["reads"], list) else entry["reads"],
                        entry.get("reads_dim", -1),
                        entry.get("reads_per_unit", 1),
                    ),
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
    calls: Sequence[tuple[float, nn.Module, Inputs]],
    clock: Clock,
    *,
    policy: ExportPolicy,
    points: int = 9,
    rounds: Rounds | None = None,
    monitor: Monitor | None = None,
    on_site: Callable[[str], None] | None = None,
    slice_site: SliceSite = materialize,
) -> LatencyTable:
    """Slice a copy of each distinct site to a grid of widths and time it on the arguments it really gets.

    Sites of the same architecture and arguments share one measurement.

    Args:
        model: the teacher or a skeleton of it, in eval mode on the device that is timed.
        groups: the groups that the adapter declares for the model.
        sites: the sites to time.
        calls: what the latency is made of, as (how many times, a module that calls `model`, its inputs): a plain
            forward pass is [(1, model, inputs)].
        clock: the clock that takes the times.
        policy: the policy whose rounding decides which widths exist.
        points: the number of grid points for a group with many units; fewer when several groups change a site.
        rounds: how long to measure.
        monitor: what watches the device for disturbances meanwhile.
        on_site: a function that is called with each site's path once the site is timed.
        slice_site: makes the sliced modules that are timed; an adapter's takes them from the model that it exports.
    """
    by_name = {group.name: group for group in groups}
    captured = [
        (times, capture_arguments(model, [site.module for site in sites], call, given)) for times, call, given in calls
    ]
    measured: dict[tuple[Any, ...], NDArray[np.float64]] = {}
    tables = []
    for site in sites:
        members = [by_name[name] for name in site.groups]
        inner = sum(1 for group in members if not group.removes)
        count = points if inner <= 1 else max(3, points // inner + 1)
        grid = tuple(_grid(policy.widths(group), count) for group in members)
        module = model.get_submodule(site.module)
        ms = np.zeros([len(axis) for axis in grid])
        for times, arguments in captured:
            shapes = tuple(tuple(x.shape) for x in SiteCall.inputs(arguments[site.module]))
            read = tuple(site.groups.index(name) for name in site.reading)  # names differ among identical layers
            signature = (repr(module), shapes, grid, read, site.reads_dim, site.reads_per_unit)
            if signature not in measured:
                measured[signature] = _time_grid(
                    model,
                    groups,
                    site,
                    grid,
                    arguments[site.module],
                    clock,
                    rounds or Rounds(),
                    monitor=monitor,
                    slice_site=slice_site,
                )
            ms = ms + times * measured[signature]
        tables.append(SiteTable(site, grid, ms))
        if on_site is not None:
            on_site(site.module)
    return LatencyTable(tables)


def _grid(widths: Sequence[int], count: int) -> tuple[int, ...]:
    """Choose at most `count` of the allowed widths, evenly spread, with both ends among them."""
    picks = np.linspace(0, len(widths) - 1, min(count, len(widths))).round().astype(int)
    return tuple(widths[pick] for pick in sorted(set(picks.tolist())))


class SiteCall(nn.Module):
    """A site together with what it is called with, so that a clock can call it on tensors alone.

    The tensors among the arguments become the inputs of `forward`; the other arguments (a cache, flags) are kept, and
    copied with the call, so that no two calls share a cache.
    """

    def __init__(self, module: nn.Module, arguments: Arguments) -> None:
        super().__init__()
        self.module = module
        leaves, self.structure = tree_flatten(arguments)
        self.others = [None if isinstance(leaf, Tensor) else copy.deepcopy(leaf) for leaf in leaves]
        self.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]

    @staticmethod
    def inputs(arguments: Arguments) -> Inputs:
        """Return the tensors among the arguments, in the order that `forward` takes them in."""
        return tuple(leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor))

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        leaves = [next(given) if own else other for own, other in zip(self.is_tensor, self.others, strict=True)]
        args, kwargs = tree_unflatten(leaves, self.structure)
        return self.module(*args, **kwargs)


def capture_arguments(model: nn.Module, paths: Sequence[str], call: nn.Module, inputs: Inputs) -> dict[str, Arguments]:
    """Record the (positional, keyword) arguments that each module is called with in a call of the whole model."""
    captured: dict[str, Arguments] = {}

    def capture(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            captured[path] = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(capture(path), with_kwargs=True, prepend=True)
        for path in paths
    ]
    try:
        with torch.no_grad():
            call(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return captured


def _time_grid(
    model: nn.Module,
    groups: Sequence[Group],
    site: Site,
    grid: Sequence[Sequence[int]],
    arguments: Arguments,
    clock: Clock,
    rounds: Rounds,
    *,
    monitor: Monitor | None,
    slice_site: SliceSite,
) -> NDArray[np.float64]:
    """Measure the milliseconds at every grid point.

    Points that slice to the same module are timed once; a module that is removed takes no time.
    """
    full = full_widths(groups)
    # From the widths of a grid point to those that remain once removed parents have taken their units along.
    points: dict[tuple[int, ...], tuple[int, ...]] = {}
    calls: dict[str, SiteCall] = {}
    inputs: dict[str, Inputs] = {}
    # The full width comes first: the others are compared with it.
    for widths in itertools.product(*[reversed(axis) for axis in grid]):
        keep = keep_first(groups, full | dict(zip(site.groups, widths, strict=True)))
        remain = widths_of(keep, groups)
        points[widths] = tuple(remain[name] for name in site.groups)
        if str(points[widths]) not in calls:
            module = slice_site(model, groups, keep, site.module)
            if not isinstance(module, nn.Identity):
                calls[str(points[widths])] = SiteCall(module, arguments)
                first, *others = SiteCall.inputs(arguments)
                if site.reading:
                    gone = sum(full[name] - remain[name] for name in site.reading) * site.reads_per_unit
                    first = first.narrow(site.reads_dim, 0, first.shape[site.reads_dim] - gone).contiguous()
                inputs[str(points[widths])] = (first, *others)
    times = relative_medians(calls, inputs, clock, rounds, monitor=monitor)
    ms = np.asarray([times.get(str(points[widths]), 0.0) for widths in itertools.product(*grid)])
    return monotone(ms.reshape([len(axis) for axis in grid]))


def monotone(ms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Make times ascend along every axis, by isotonic least squares along each axis in turn.

    An axis that is done stays monotone: where one row lies nowhere above another, nor does its isotonic regression,
    which is a maximum of minima of means (Robertson, Wright and Dykstra, Order restricted statistical inference, 1988).
    """
    for axis in range(ms.ndim):
        ms = np.apply_along_axis(lambda row: isotonic_regression(row).x, axis, ms)
    return ms
