"""The model card that lies beside a slim model: what was measured, where, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hawada.core.files import signed
from hawada.report.table import shown


def model_card(result: Mapping[str, Any], *, name: str, base: str | None, loads_with: str) -> str:
    """Markdown with the front matter that the Hub reads, signed, so that a card that somebody edited is told apart.

    Args:
        result: what `stage=evaluate` found out.
        name: of the experiment.
        base: repository or folder of the unpruned model, or None for one that was trained here; a folder is not told.
        loads_with: Python code that loads the folder `path`.
    """
    teacher, slim, metric, timed = result["teacher"], result["slim"], result["metric"], result["timed_as"]
    rows = [
        ("parameters", f"{teacher['params']:,}", f"{slim['params']:,}"),
        ("multiply-accumulates", f"{teacher['macs']:,}", f"{slim['macs']:,}"),
        (metric, shown(metric, teacher[metric]), shown(metric, slim[metric])),
        ("agreement with the unpruned model", "", f"{result['agreement']:.2%}"),
    ]
    for phase, measured in result["phases"].items():
        ms = [_interval(measured[key]) for key in ("teacher_ms", "slim_ms")]
        rows.append((f"{phase}, ms", ms[0], f"{ms[1]} ({_interval(measured['ratio'])} of the unpruned)"))
    table = "\n".join(f"| {label} | {before} | {after} |" for label, before, after in rows)
    fingerprint = result["environment"]["fingerprint"]
    how = ", ".join(f"{key} {value}" for key, value in timed.items())
    on_hub = base is not None and base.count("/") == 1 and base[0] not in "./~" and not Path(base).exists()
    front = ["library_name: transformers" if "transformers" in loads_with else "library_name: pytorch"]
    front += [f"base_model: {base}"] if on_hub else []
    said = {
        "simulated": "These milliseconds come from a simulated device; nothing was measured.",
    }.get(result["verdict"], "Medians with 95 % bootstrap intervals, both models measured in interleaved rounds.")
    lines = [
        "---",
        *front,
        "tags: [pruned, hawada]",
        "---",
        "",
        f"# {name}",
        "",
        f"A slim version of {base if on_hub else name}, made by HawAda: its widths were chosen so "
        "that its measured latency meets a budget.",
        "",
        f"Verdict: **{result['verdict']}** ({result['reason']}).",
        "",
        "| | unpruned | slim |",
        "|---|---|---|",
        table,
        "",
        f"{said} Measured as: {how}; on {fingerprint['name']}, torch {fingerprint['torch']}. Another device, shape or "
        "version has other latencies.",
        "",
        "```python",
        loads_with,
        "```",
        "",
    ]
    return signed("\n".join(lines))


def _interval(interval: Mapping[str, float]) -> str:
    return f"{interval['median']:.4g} [{interval['low']:.4g}, {interval['high']:.4g}]"
