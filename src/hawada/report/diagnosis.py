"""What the doctor found, on screen and in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from hawada.core.latency import TINY_MS
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
LITTLE = 0.3  # a largest share below this leaves most of the time unexplained


def describe(result: Mapping[str, Any]) -> list[str]:
    """The findings as sentences, the diagnosis first.

    Args:
        result: what `stage=doctor` found.
    """
    words = [
        _diagnosis(result),
        *_doubts(result),
        *_reach(result),
        *_runtimes(result),
        *_stairs(result["stairs"]),
        _target(result),
    ]
    return (["This device is simulated; nothing was measured."] if result["simulated"] else []) + words


def summarize_findings(result: Mapping[str, Any]) -> str:
    """The findings in one line."""
    best = min((found["ratio"]["median"] for found in result["slices"].values()), default=1.0)
    simulated = " (simulated)" if result["simulated"] else ""
    return f"{result['bottleneck']['kind']}-bound{simulated}; pruning could give up to {_speed_up(best)}"


def _diagnosis(result: Mapping[str, Any]) -> str:
    """The bottleneck, what half of the widths buys, and what to do."""
    timed, bottleneck = result["timed_as"], result["bottleneck"]
    kind, shares = bottleneck["kind"], bottleneck["shares"]
    where = f"At batch {timed['batch']}" + (f" in {timed['phase']}" if timed["phase"] != "forward" else "")
    text = f"{where} in {timed['runtime']} mode this model is {kind}-bound"
    if max(shares.values()) < LITTLE:
        text += f", though {RESOURCES[kind]} explains only {shares[kind]:.0%} of its time"
    half = result["slices"].get("half")
    if half is not None:
        removed = "half" if 0.45 <= half["removed"] <= 0.55 else f"{half['removed']:.0%}"
        text += f": removing {removed} of the {_listed(result['units']['width'])} {_bought(half['ratio'])}"
    return f"{text}.{_remedy(result)}"


def _doubts(result: Mapping[str, Any]) -> list[str]:
    """What speaks against the diagnosis: a least time for some resource that is more than the whole."""
    if not result["bottleneck"]["impossible"]:
        return []
    largest = max(result["bottleneck"]["shares"].values())
    return [
        f"Take this with care: that would need {largest:.0%} of the time, so the device was slower when it was probed "
        "than when it ran the model; stop what else runs there and repeat this under another name=..."
    ]


def _bought(ratio: Mapping[str, float]) -> str:
    """What a slice buys of the time, as far as its interval allows to say."""
    if ratio["low"] > 1:
        return f"costs {ratio['median'] - 1:.0%}"
    return "buys nothing measurable" if ratio["high"] > 0.995 else f"buys {1 - ratio['median']:.0%}"


def _remedy(result: Mapping[str, Any]) -> str:
    """What helps against this bottleneck, as one sentence; empty where nothing does."""
    timed, units, kind = result["timed_as"], result["units"], result["bottleneck"]["kind"]
    narrow = "narrow it" if units["width"] else ""
    depth = f"remove {_listed(units['depth'])}" if units["depth"] else ""
    graph = "use runtime=cudagraph" if (timed["runtime"], timed["device"]) == ("eager", "cuda") else ""
    # A CPU need not be faster at products in half precision, but it has less to move.
    shorter = timed["dtype"] == "float32" and (kind == "memory" or timed["device"] == "cuda")
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


def _reach(result: Mapping[str, Any]) -> list[str]:
    """The best that pruning could give."""
    slices = result["slices"]
    best = [
        f"{_speed_up(slices[name]['ratio']['median'])} by {text}"
        for name, text in SLICES.items()
        if name in slices and name != "half"
    ]
    sentences = [f"The most that pruning could give: {', '.join(best)}."] if best else []
    if not result["units"]["depth"]:
        sentences.append("No layers or branches of this model can go, so depth gives nothing.")
    elif "depth" not in slices:
        sentences.append("All layers and branches must stay (export.minimum), so depth gives nothing.")
    if "width" not in slices:
        sentences.append("No widths of this model can shrink, so width gives nothing.")
    return sentences


def _runtimes(result: Mapping[str, Any]) -> list[str]:
    sentences = []
    for runtime, found in result["runtimes"].items():
        if "refused" in found:
            sentences.append(f"runtime={runtime} is not possible here: {found['refused']}.")
            continue
        text = f"runtime={runtime} takes {found['ratio']['median']:.2f} of the time that {found['against']} takes"
        half = found.get("half")
        sentences.append(text + (f"; half of the widths {_bought(half)} there." if half else "."))
    return sentences


def _stairs(stairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the time jumps, site by site."""
    found = [f"{stair['site']} after {_widths(stair['ends'])}" for stair in stairs if stair["ends"]]
    if not found:
        return ["No stairs show in the widths: the time falls evenly with the units."] if stairs else []
    return [f"The time jumps as units are added ({'; '.join(found)}): stop there, one more unit costs a whole step."]


def _widths(ends: Sequence[int]) -> str:
    """Ends of stairs, as multiples where they are all of them."""
    step = math.gcd(*ends)
    if len(ends) > 2 and list(ends) == list(range(step, ends[-1] + 1, step)):
        return f"multiples of {step}"
    return ", ".join(map(str, ends[:8])) + (" …" if len(ends) > 8 else "")


def _target(result: Mapping[str, Any]) -> str:
    target = result["target"]
    if target is None:
        return "No target is sensible here: the smallest model is hardly faster than one with half of the widths."
    (low, high), (low_ms, high_ms) = target["ratio"], target["ms"]
    return (
        f"A sensible target lies between {low_ms:.3g} ms ({low:.2f} of the teacher; the fastest there is, with little "
        f"left of the model) and {high_ms:.3g} ms ({high:.2f}; half of the widths): "
        f"for a start, budget.target_ratio={math.sqrt(low * high):.2f}."
    )


def _speed_up(ratio: float) -> str:
    return f"{1 / max(ratio, TINY_MS):.2f}x"


def _listed(kinds: Sequence[str]) -> str:
    """Kinds of units in the plural, as one enumeration."""
    names = [PLURALS.get(kind, f"{kind} units") for kind in kinds]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def print_diagnosis(result: Mapping[str, Any]) -> None:
    """The table of what was measured, then the sentences."""
    bottleneck, timed = result["bottleneck"], result["timed_as"]
    source = "simulated" if result["simulated"] else timed["device"]
    table = Table(title=escape(f"batch {timed['batch']}, {timed['dtype']}, {source}"), title_justify="left")
    for name in ("", "ms", "of the teacher", "speed-up"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("teacher", _interval(result["teacher"]["latency_ms"]), "", "1.00x")
    for kind, text in RESOURCES.items():
        table.add_row(f"  {text}, at least", f"{bottleneck[f'{kind}_ms']:.3g}", f"{bottleneck['shares'][kind]:.0%}", "")
    for name, text in SLICES.items():
        if name in result["slices"]:
            _add_measured(table, text, result["slices"][name])
    for runtime, found in result["runtimes"].items():
        if "ratio" in found:
            _add_measured(table, f"teacher, runtime={runtime}", found)
    console.print(table)
    for sentence in result["words"]:
        console.print(escape(sentence), soft_wrap=True)


def _add_measured(table: Table, text: str, found: Mapping[str, Any]) -> None:
    ratio = found["ratio"]
    table.add_row(text, _interval(found["latency_ms"]), _interval(ratio), _speed_up(ratio["median"]))


def _interval(interval: Mapping[str, float]) -> str:
    return f"{interval['median']:.3g} [{interval['low']:.3g}, {interval['high']:.3g}]"
