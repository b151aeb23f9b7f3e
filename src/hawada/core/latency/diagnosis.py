"""What a model's time goes into on a device, and how much of it pruning could take away: before any training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hawada.core.latency.clock import Clock
from hawada.core.latency.operators import Operator, list_operators
from hawada.core.latency.profiler import TINY_MS, Rounds, bootstrap_median, sample_rounds
from hawada.core.latency.site_table import Arguments, SiteCall
from hawada.core.structure import (
    ExportPolicy,
    Group,
    Inputs,
    Keep,
    Site,
    SliceSite,
    full_widths,
    keep_first,
    materialize,
)

CHAIN = 128  # operators whose launches are timed together
TRANSFERRED = (1 << 20, 1 << 23, 1 << 26, 1 << 28)  # bytes of the tensors that bandwidth is measured on
MATRICES = (512, 1024, 2048, 4096, 8192)  # sizes of the products that arithmetic is measured on
PATIENCE_MS = 60.0  # no larger product is tried where it would take longer than this
PEAK_SAMPLES = (7, 60)  # fewest and most
PEAK_SECONDS = 0.7  # that go into them
MUCH = 1.1  # least time for one resource, relative to the measured time, above which a peak must be wrong
FEWEST = 9  # widths in a staircase, however long they take


@dataclass(frozen=True)
class Peaks:
    """What a device does at best.

    Attributes:
        launch_ms: of one operator that computes next to nothing.
        transfers: (bytes moved, milliseconds beyond the launch), ascending; caches make small ones faster.
        flops_per_ms: in products of large matrices, in the dtype that is timed.
    """

    launch_ms: float
    transfers: tuple[tuple[int, float], ...]
    flops_per_ms: float

    def transfer_ms(self, count: int) -> float:
        """Milliseconds to move so many bytes, at the bandwidth of transfers of that size."""
        sizes = [math.log(size) for size, _ in self.transfers]
        rates = [size / ms for size, ms in self.transfers]
        return count / float(np.interp(math.log(max(count, 1)), sizes, rates))

    def best_of(self, other: Peaks) -> Peaks:
        """The better of two measurements in each respect: whatever else ran on the device can only have slowed it."""
        best = dict(self.transfers)
        for size, ms in other.transfers:
            best[size] = min(ms, best.get(size, ms))
        flops_per_ms = max(self.flops_per_ms, other.flops_per_ms)
        return Peaks(min(self.launch_ms, other.launch_ms), tuple(sorted(best.items())), flops_per_ms)


class _Chain(nn.Sequential):
    """Tiny operators, each called by a module of its own as in a model."""

    def __init__(self, length: int) -> None:
        super().__init__(*(nn.ReLU() for _ in range(length)))


class _Scale(nn.Module):
    """Reads and writes a tensor once, in place: a new result would be paid for in page faults on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(1.0)


class _Product(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y


def measure_peaks(clock: Clock, device: torch.device, dtype: torch.dtype) -> Peaks:
    """Launch cost, bandwidths and arithmetic peak by the clock that times the model: the best of a few samples each.

    Args:
        clock: takes the time.
        device: where; nothing is allocated for a simulated clock.
        dtype: of the products.
    """
    place = torch.device("meta") if clock.simulated else device

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, device=place, dtype=dtype)

    launch_ms = _best_ms(clock, _Chain(CHAIN), (zeros(1),)) / CHAIN
    transfers: list[tuple[int, float]] = []
    for size in TRANSFERRED:
        x = (zeros(size, dtype=torch.uint8).view(torch.float32),)
        whole_ms = _best_ms(clock, _Scale(), x)
        if whole_ms > 1.5 * launch_ms or size == TRANSFERRED[-1]:  # else the launch hides what the transfer takes
            transfers.append((_total(_Scale(), x).bytes, _beyond(launch_ms, whole_ms)))
    transfers = _no_slower_when_small(transfers)
    best = 0.0
    for size in MATRICES:
        pair = (zeros(size, size), zeros(size, size))
        whole_ms = _best_ms(clock, _Product(), pair)
        best = max(best, _total(_Product(), pair).flops / _beyond(launch_ms, whole_ms))
        if 8 * whole_ms > PATIENCE_MS and size > MATRICES[0] and not clock.simulated:
            break
    return Peaks(launch_ms, tuple(transfers), best)


def _best_ms(clock: Clock, model: nn.Module, inputs: Inputs) -> float:
    sampler = clock.prepare(model, inputs)
    fewest, most = PEAK_SAMPLES
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < fewest or (len(samples) < most and time.perf_counter() - start < PEAK_SECONDS):
        samples.append(sampler())
        if clock.simulated and len(samples) == fewest:
            break
    return max(min((ms for ms in samples if math.isfinite(ms)), default=TINY_MS), TINY_MS)


def _beyond(launch_ms: float, whole_ms: float) -> float:
    """What a call takes besides its launch; on a device where that is lost in the noise, a small part of it."""
    return max(whole_ms - launch_ms, 0.05 * whole_ms)


def _no_slower_when_small(transfers: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Give each transfer at least the bandwidth of every larger one; less is what a busy machine made of it."""
    result: list[tuple[int, float]] = []
    rate = 0.0
    for size, ms in reversed(transfers):
        rate = max(rate, size / ms)
        result.insert(0, (size, size / rate))
    return result


def _total(model: nn.Module, inputs: Inputs) -> Operator:
    operators = list_operators(model, inputs)
    return Operator(sum(operator.flops for operator in operators), sum(operator.bytes for operator in operators))


@dataclass(frozen=True)
class Bottleneck:
    """What bounds a model, and the least time that each of the three resources needs for it.

    Attributes:
        kind: `launch`, `memory` or `compute`: the one that needs the largest share of the measured time.
        launch_ms: operators times the cost of a launch.
        memory_ms: bytes moved at the device's bandwidth.
        compute_ms: arithmetic at the device's peak.
        measured_ms: of the model.
        operators: how many there are, views left out.
        flops: of all of them.
        bytes: moved by all of them.
    """

    kind: str
    launch_ms: float
    memory_ms: float
    compute_ms: float
    measured_ms: float
    operators: int
    flops: int
    bytes: int

    @property
    def impossible(self) -> bool:
        """Whether some resource would need clearly more than the measured time: its peak was not the device's best."""
        return max(self.shares.values()) > MUCH

    @property
    def shares(self) -> dict[str, float]:
        """Each lower bound as a fraction of the measured time; above 1 where a peak was not the device's best."""
        bounds = {"launch": self.launch_ms, "memory": self.memory_ms, "compute": self.compute_ms}
        return {kind: ms / max(self.measured_ms, TINY_MS) for kind, ms in bounds.items()}

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "shares": self.shares, "impossible": self.impossible}


def find_bottleneck(operators: Sequence[Operator], peaks: Peaks, measured_ms: float) -> Bottleneck:
    """Compare the least time for launches, memory traffic and arithmetic with the time that the model takes.

    Williams et al., Roofline, 2009, with the launch cost as a third roof.
    """
    flops = sum(operator.flops for operator in operators)
    bounds = {
        "launch": len(operators) * peaks.launch_ms,
        "memory": sum(peaks.transfer_ms(operator.bytes) for operator in operators),
        "compute": flops / peaks.flops_per_ms if peaks.flops_per_ms > 0 else 0.0,
    }
    bounds = {kind: ms if math.isfinite(ms) else 0.0 for kind, ms in bounds.items()}
    return Bottleneck(
        kind=max(bounds, key=lambda kind: bounds[kind]),
        launch_ms=bounds["launch"],
        memory_ms=bounds["memory"],
        compute_ms=bounds["compute"],
        measured_ms=measured_ms,
        operators=len(operators),
        flops=flops,
        bytes=sum(operator.bytes for operator in operators),
    )


def extreme_keep(groups: Sequence[Group], policy: ExportPolicy, *, width: bool, depth: bool) -> Keep:
    """The least that may stay when only widths, only layers and branches, or both may shrink."""
    widths = {
        group.name: policy.widths(group)[0] if (depth if group.removes else width) else group.full_width
        for group in groups
    }
    branches = [group.name for group in groups if group.removes]
    return keep_first(groups, policy.restored(widths, groups, branches))


def half_keep(groups: Sequence[Group], policy: ExportPolicy) -> Keep:
    """Half of the units of every group, rounded as allowed; all layers and branches stay.

    Units inside other units go with these and are not halved once more.
    """
    by_name = {group.name: group for group in groups}
    widths = full_widths(groups)
    for group in groups:
        parent = by_name.get(group.parent or "")
        if not group.removes and (parent is None or parent.removes):
            half = policy.rounding_of(group).round(group.full_width / 2, group.full_width)
            widths[group.name] = max(half, policy.widths(group)[0])
    return keep_first(groups, widths)


def removed_fraction(keep: Mapping[str, Sequence[int]], groups: Sequence[Group]) -> float:
    """The share of the units that go, layers and branches not counted."""
    units = [group for group in groups if not group.removes]
    return 1 - sum(len(keep[group.name]) for group in units) / max(1, sum(group.units for group in units))


@dataclass(frozen=True)
class Staircase:
    """Times of one site over the widths of one group, everything else whole.

    Attributes:
        site: path of the module.
        kind: of the site.
        group: whose width varies.
        unit: kind of the group.
        widths: ascending, the last is the full one.
        ms: milliseconds at each.
        half_widths: of each time's interval, relative.
        ends: widths behind which a step up begins: as wide as possible for their time.
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
    """For each kind of site, its first site and the group inside it with the most widths; sites without one are left
    out."""
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
    """About so many widths up to `units`: all of them, or the multiples of a power of two and each one's successor.

    A step shows between a width that fills its tiles and the next.
    """
    if units <= points:
        return tuple(range(1, units + 1))
    step = 2 ** math.ceil(math.log2(2 * units / points))
    return tuple(sorted({w for base in range(step, units, step) for w in (base, base + 1)} | {units}))


def coarse_first(widths: Sequence[int]) -> list[int]:
    """The last width, the first, the one in the middle, and so on into ever finer gaps; each before its successor."""
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
) -> Staircase:
    """Time really sliced copies of one site over a fine grid of widths.

    Args:
        model: teacher or skeleton, in eval mode on the device that is timed.
        groups: its declaration.
        axis: see `stair_axes`.
        arguments: what the site is called with.
        clock: takes the time.
        points: about how many widths; fewer when preparing them takes longer than the rounds may.
        rounds: how long to measure.
        slice_site: makes the sliced modules; see `build_table`.
    """
    site, group = axis
    full = full_widths(groups)
    samplers: dict[int, Callable[[], float]] = {}
    start = time.perf_counter()
    for width in coarse_first(fine_widths(group.full_width, points)):
        late = time.perf_counter() - start > rounds.max_seconds and not clock.simulated
        if late and len(samplers) >= FEWEST:
            break  # warming up takes most of the time, and on a busy machine much of it
        keep = keep_first(groups, full | {group.name: width})
        call = SiteCall(slice_site(model, groups, keep, site.module), arguments)
        samplers[width] = clock.prepare(call, SiteCall.inputs(arguments))
    samples = sample_rounds(list(samplers.values()), rounds)  # the first, the full width, is the baseline
    relative = samples / np.maximum(samples[:, [0]], TINY_MS)
    ratios = {width: bootstrap_median(relative[:, column]) for column, width in enumerate(samplers)}
    widths, full_ms = tuple(sorted(samplers)), float(np.median(samples[:, 0]))
    ms = [ratios[width].median * full_ms for width in widths]
    noise = [ratios[width].half_width for width in widths]
    ends = stair_ends(widths, ms, noise)
    return Staircase(site.module, site.kind, group.name, group.kind, widths, tuple(ms), tuple(noise), ends)


def stair_ends(widths: Sequence[int], ms: Sequence[float], half_widths: Sequence[float]) -> tuple[int, ...]:
    """Widths with one more unit than which the time is, and stays, higher by much more than slope and noise explain."""
    rise = max(0.0, (ms[-1] - ms[0]) / max(1, widths[-1] - widths[0]))
    ends = []
    for i in range(len(widths) - 1):
        step = min(ms[i + 1 :]) - ms[i]
        noise = ms[i] * half_widths[i] + ms[i + 1] * half_widths[i + 1]
        # Where widths between these two were not measured, it is unknown behind which one the step is.
        if widths[i + 1] == widths[i] + 1 and step > max(2 * rise, noise, 0.02 * ms[-1]):
            ends.append(widths[i])
    return tuple(ends)


def sensible_ratios(fastest: float, half: float) -> tuple[float, float] | None:
    """From the fastest that is possible up to what half of the units gives; None where that leaves no room."""
    return (fastest, min(half, 1.0)) if 0 < fastest < 0.97 * min(half, 1.0) else None
