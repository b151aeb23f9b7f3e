"""How the time of a site falls with the width of one group: evenly, or in steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from hawada.core.latency.clock import Clock
from hawada.core.latency.monitor import Monitor
from hawada.core.latency.profiler import TINY_MS, Rounds, bootstrap_median, sample_rounds
from hawada.core.latency.site_table import Arguments, SiteCall
from hawada.core.structure import Group, Site, SliceSite, full_widths, keep_first, materialize

MIN_WIDTHS = 9  # A staircase has at least so many widths, however long preparing them takes.
MIN_STEP = 0.02  # A smaller rise, relative to the time at the full width, is no step.


@dataclass(frozen=True)
class Staircase:
    """Times of one site over the widths of one group, everything else whole.

    Attributes:
        site: the path of the module.
        kind: the kind of the site.
        group: the name of the group whose width varies.
        unit: the kind of the group.
        widths: the measured widths, ascending; the last is the full one.
        ms: the milliseconds at each width.
        half_widths: half the width of each time's interval, relative to the time.
        ends: the widths behind which a step up begins, so each is as wide as possible for its time.
    """

    site: str
    kind: str
    group: str
    unit: str
    widths: tuple[int, ...]
    ms: tuple[float, ...]
    half_widths: tuple[float, ...]
    ends: tuple[int, ...]


def stair_axes(sites: Sequence[Site], groups: Sequence[Group]) -> list[tuple[Site, Group]]:
    """Choose, for each kind of site, its first site and the group inside it with the most widths.

    Sites without a group inside are left out.
    """
    by_name = {group.name: group for group in groups}
    axes: dict[str, tuple[Site, Group]] = {}
    for site in sites:
        inner = [
            group
            for group in (by_name[name] for name in site.groups)
            if group.cuts and all(cut.tensor.startswith(f"{site.module}.") for cut in group.cuts)
        ]
        if inner:
            axes.setdefault(site.kind, (site, max(inner, key=lambda group: group.full_width)))
    return list(axes.values())


def fine_widths(units: int, points: int) -> tuple[int, ...]:
    """Choose about `points` widths up to `units`: all, or the multiples of a power of two, each with its successor.

    A step shows between a width that fills its tiles and the next.
    """
    if units <= points:
        return tuple(range(1, units + 1))
    step = 2 ** math.ceil(math.log2(2 * units / points))
    return tuple(sorted({w for base in range(step, units, step) for w in (base, base + 1)} | {units}))


def coarse_first(widths: Sequence[int]) -> list[int]:
    """Order widths: the last and the first, then the middle of each gap between them, each before its successor."""
    order, gaps = [widths[-1], widths[0]], [(0, len(widths) - 1)]
    for low, high in gaps:  # grows as it is walked through
        middle = (low + high) // 2
        if low < middle < high:
            order.append(widths[middle])
            gaps += [(low, middle), (middle, high)]
    return list(dict.fromkeys(w for width in order for w in (width, width + 1) if w in widths))


def measure_staircase(
    model: nn.Module,
    groups: Sequence[Group],
    axis: tuple[Site, Group],
    arguments: Arguments,
    clock: Clock,
    *,
    points: int,
    rounds: Rounds,
    slice_site: SliceSite = materialize,
    monitor: Monitor | None = None,
) -> Staircase:
    """Time really sliced copies of one site over a fine grid of widths.

    Args:
        model: the teacher or a skeleton of it, in eval mode on the device that is timed.
        groups: the groups that the adapter declares for the model.
        axis: the site and the group whose width varies, see `stair_axes`.
        arguments: what the site is called with.
        clock: the clock that takes the times.
        points: about how many widths are timed; fewer when preparing them takes longer than the rounds may.
        rounds: how long to measure.
        slice_site: makes the sliced modules; see `build_table`.
        monitor: what watches the device for disturbances meanwhile.
    """
    site, group = axis
    full = full_widths(groups)
    samplers: dict[int, Callable[[], float]] = {}
    start = time.perf_counter()
    for width in coarse_first(fine_widths(group.full_width, points)):
        late = time.perf_counter() - start > rounds.max_seconds and not clock.simulated
        if late and len(samplers) >= MIN_WIDTHS:
            break  # preparing a width includes its warm-up, which takes most of the time, above all on a busy machine
        keep = keep_first(groups, full | {group.name: width})
        call = SiteCall(slice_site(model, groups, keep, site.module), arguments)
        samplers[width] = clock.prepare(call, SiteCall.inputs(arguments))
    samples = sample_rounds(
        list(samplers.values()), rounds, monitor=monitor
    )  # the first, the full width, is the baseline
    relative = samples / np.maximum(samples[:, [0]], TINY_MS)
    ratios = {width: bootstrap_median(relative[:, column]) for column, width in enumerate(samplers)}
    widths, full_ms = tuple(sorted(samplers)), float(np.median(samples[:, 0]))
    ms = [ratios[width].median * full_ms for width in widths]
    noise = [ratios[width].half_width for width in widths]
    ends = stair_ends(widths, ms, noise)
    return Staircase(site.module, site.kind, group.name, group.kind, widths, tuple(ms), tuple(noise), ends)


def stair_ends(widths: Sequence[int], ms: Sequence[float], half_widths: Sequence[float]) -> tuple[int, ...]:
    """Find the widths behind which the time rises, and stays higher, by clearly more than slope and noise explain."""
    rise = max(0.0, (ms[-1] - ms[0]) / max(1, widths[-1] - widths[0]))
    ends = []
    for i in range(len(widths) - 1):
        step = min(ms[i + 1 :]) - ms[i]
        noise = ms[i] * half_widths[i] + ms[i + 1] * half_widths[i + 1]
        # Where widths between these two were not measured, it is unknown behind which one the step is.
        if widths[i + 1] == widths[i] + 1 and step > max(2 * rise, noise, MIN_STEP * ms[-1]):
            ends.append(widths[i])
    return tuple(ends)
