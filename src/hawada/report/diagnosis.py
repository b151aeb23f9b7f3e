"""The findings of `stage=doctor`: as a table on screen and as sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from hawada.core.latency import TINY_MS
from hawada.core.verdict import Interval
from hawada.experiment.results import ComparedRuntime, DoctorResult, RefusedRuntime, Stairs, TimedModel
from hawada.report.figures import format_interval
from hawada.report.progress import console

PLURALS = {
    "channel": "channels",
    "head": "heads",
    "kv_head": "KV heads",
    "query_head": "query heads",
    "ffn": "FFN neurons",
    "stream": "stream channels",
    "branch": "branches",
    "layer": "layers",
    "attention": "attentions",
    "mlp": "MLPs",
}
RESOURCES = {"launch": "launching operators", "memory": "moving data", "compute": "arithmetic"}
SLICES = {"half": "half of the widths", "width": "width alone", "depth": "depth alone", "both": "width and depth"}
MIN_EXPLAINED_SHARE = 0.3  # Where no resource explains more of the time, the diagnosis tells so.
MAX_RATIO_OF_GAIN = 0.995  # A slice whose interval reaches above this ratio gains nothing that can be measured.
MAX_LISTED_ENDS = 8  # of stairs in a sentence


def describe(result: DoctorResult) -> list[str]:
    """Describe the findings in sentences, the diagnosis first.

    Args:
        result: the result of `stage=doctor`.
    """
    sentences = [
        _diagnosis(result),
        *_doubts(result),
        *_reach(result),
        *_compared_runtimes(result),
        *_stairs(result.stairs),
        _sensible_target(result),
    ]
    return (["This device is simulated; nothing was measured."] if result.simulated else []) + sentences


def summarize_findings(result: DoctorResult) -> str:
    """Summarize the findings in one line."""
    best = min((found.ratio.median for found in result.slices.values()), default=1.0)
    simulated = " (simulated)" if result.simulated else ""
    return f"{result.bottleneck.kind}-bound{simulated}; pruning could give up to {_speed_up(best)}"


def _diagnosis(result: DoctorResult) -> str:
    """Name the bottleneck, what removing half of the widths gains, and what to do."""
    timed, bottleneck = result.timed_as, result.bottleneck
    kind, shares = bottleneck.kind, bottleneck.shares
    where = f"At batch {timed.batch}" + (f" in {timed.phase}" if timed.phase != "forward" else "")
    text = f"{where} in {timed.runtime} mode this model is {kind}-bound"
    if max(shares.values()) < MIN_EXPLAINED_SHARE:
        text += f", though {RESOURCES[kind]} explains only {shares[kind]:.0%} of its time"
    half = result.slices.get("half")
    if half is not None:
        removed = "half" if 0.45 <= half.removed <= 0.55 else f"{half.removed:.0%}"
        text += f": removing {removed} of the {_enumerate(result.units.width)} {_gain(half.ratio)}"
    return f"{text}.{_remedy(result)}"


def _doubts(result: DoctorResult) -> list[str]:
    """Warn where some resource would need more than the whole time, which casts doubt on the diagnosis."""
    if not result.bottleneck.impossible:
        return []
    largest = max(result.bottleneck.shares.values())
    return [
        f"Take this with care: that would need {largest:.0%} of the time, so the device was slower when it was probed "
        "than when it ran the model; stop what else runs there and repeat this under another name=..."
    ]


def _gain(ratio: Interval) -> str:
    """Tell how much of the time a slice saves, as far as its interval allows."""
    if ratio.low > 1:
        return f"costs {ratio.median - 1:.0%}"
    return "buys nothing measurable" if ratio.high > MAX_RATIO_OF_GAIN else f"buys {1 - ratio.median:.0%}"


def _remedy(result: DoctorResult) -> str:
    """Name what helps against this bottleneck in one sentence, which is empty where nothing does."""
    timed, units, kind = result.timed_as, result.units, result.bottleneck.kind
    narrow = "narrow it" if units.width else ""
    depth = f"remove {_enumerate(units.depth)}" if units.depth else ""
    graph = "use runtime=cudagraph" if (timed.runtime, timed.device) == ("eager", "cuda") else ""
    # Half precision need not make a CPU faster at products, but leaves it fewer bytes to move.
    shorter = timed.dtype == "float32" and (kind == "memory" or timed.device == "cuda")
    half = "use a half-precision gpu.dtype" if shorter else ""
    ways = {
        "launch": [depth, "raise the batch", graph],
        "memory": [narrow, depth, half],
        "compute": [narrow, depth, half, "lower the batch"],
    }[kind]
    present = [way for way in ways if way]
    if not present:
        return ""
    *others, last = present
    text = f"{', '.join(others)}{',' if len(others) > 1 else ''} or {last}" if others else last
    return f" {text[0].upper()}{text[1:]}."


def _reach(result: DoctorResult) -> list[str]:
    """Tell the most that pruning could give, and what cannot be pruned."""
    slices = result.slices
    best = [
        f"{_speed_up(slices[name].ratio.median)} by {text}"
        for name, text in SLICES.items()
        if name in slices and name != "half"
    ]
    sentences = [f"The most that pruning could give: {', '.join(best)}."] if best else []
    if not result.units.depth:
        sentences.append("No layers or branches of this model can go, so depth gives nothing.")
    elif "depth" not in slices:
        sentences.append("All layers and branches must stay (export.minimum), so depth gives nothing.")
    if "width" not in slices:
        sentences.append("No widths of this model can shrink, so width gives nothing.")
    return sentences


def _compared_runtimes(result: DoctorResult) -> list[str]:
    """Compare the other runtimes with the one that was asked for."""
    sentences = []
    for runtime, found in result.runtimes.items():
        if isinstance(found, RefusedRuntime):
            sentences.append(f"runtime={runtime} is not possible here: {found.refused}.")
            continue
        text = f"runtime={runtime} takes {found.ratio.median:.2f} of the time that {found.against} takes"
        half = found.half
        sentences.append(text + (f"; half of the widths {_gain(half)} there." if half else "."))
    return sentences


def _stairs(stairs: Sequence[Stairs]) -> list[str]:
    """Tell, site by site, where the time jumps."""
    found = [f"{stair.site} after {_widths(stair.ends)}" for stair in stairs if stair.ends]
    if not found:
        return ["No stairs show in the widths: the time falls evenly with the units."] if stairs else []
    return [f"The time jumps as units are added ({'; '.join(found)}): stop there, one more unit costs a whole step."]


def _widths(ends: Sequence[int]) -> str:
    """Write the ends of stairs, as multiples of a number where they are all of its multiples."""
    step = math.gcd(*ends)
    if len(ends) > 2 and list(ends) == list(range(step, ends[-1] + 1, step)):
        return f"multiples of {step}"
    return ", ".join(map(str, ends[:MAX_LISTED_ENDS])) + (" …" if len(ends) > MAX_LISTED_ENDS else "")


def _sensible_target(result: DoctorResult) -> str:
    """Suggest a target between the fastest model and one with half of the widths."""
    target = result.target
    if target is None:
        return "No target is sensible here: the smallest model is hardly faster than one with half of the widths."
    (low, high), (low_ms, high_ms) = target.ratio, target.ms
    return (
        f"A sensible target lies between {low_ms:.3g} ms ({low:.2f} of the teacher; the fastest there is, with little "
        f"left of the model) and {high_ms:.3g} ms ({high:.2f}; half of the widths): "
        f"for a start, budget.target_ratio={math.sqrt(low * high):.2f}."
    )


def _speed_up(ratio: float) -> str:
    """Write how many times faster a model is that takes this share of the time."""
    return f"{1 / max(ratio, TINY_MS):.2f}x"


def _enumerate(kinds: Sequence[str]) -> str:
    """Enumerate kinds of units in the plural."""
    names = [PLURALS.get(kind, f"{kind} units") for kind in kinds]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def print_diagnosis(result: DoctorResult) -> None:
    """Print the table of what was measured, then the sentences."""
    bottleneck, timed = result.bottleneck, result.timed_as
    source = "simulated" if result.simulated else timed.device
    table = Table(title=escape(f"batch {timed.batch}, {timed.dtype}, {source}"), title_justify="left")
    for name in ("", "ms", "of the teacher", "speed-up"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("teacher", format_interval(result.teacher.latency_ms), "", "1.00x")
    for kind, text in RESOURCES.items():
        table.add_row(f"  {text}, at least", f"{bottleneck.bounds_ms[kind]:.3g}", f"{bottleneck.shares[kind]:.0%}", "")
    for name, text in SLICES.items():
        if name in result.slices:
            _add_measured(table, text, result.slices[name])
    for runtime, found in result.runtimes.items():
        if isinstance(found, ComparedRuntime):
            _add_measured(table, f"teacher, runtime={runtime}", found)
    console.print(table)
    for sentence in result.words:
        console.print(escape(sentence), soft_wrap=True)


def _add_measured(table: Table, text: str, found: TimedModel) -> None:
    """Add a row for one measured model or runtime."""
    ratio = found.ratio
    table.add_row(text, format_interval(found.latency_ms), format_interval(ratio), _speed_up(ratio.median))
