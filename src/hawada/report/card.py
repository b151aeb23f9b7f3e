"""The model card that lies beside a slim model: what was measured, where, and how to load it."""

from __future__ import annotations

from pathlib import Path

from hawada.core.files import signed
from hawada.core.verdict import Verdict
from hawada.experiment.results import EvaluateResult, to_json
from hawada.report.figures import format_interval, format_quality


def model_card(result: EvaluateResult, *, name: str, base: str | None, loads_with: str) -> str:
    """Write a card in Markdown with the front matter that the Hub displays, signed so that later edits are recognised.

    Args:
        result: the result of `stage=evaluate`.
        name: the name of the experiment.
        base: the repository or folder of the unpruned model, or None for one that was trained here; a folder is not
            mentioned in the card.
        loads_with: Python code that loads the slim model.
    """
    teacher, slim, metric, timed = result.teacher, result.slim, result.metric, result.timed_as
    rows = [
        ("parameters", f"{teacher.params:,}", f"{slim.params:,}"),
        ("multiply-accumulates", f"{teacher.macs:,}", f"{slim.macs:,}"),
        (metric, format_quality(metric, teacher.quality), format_quality(metric, slim.quality)),
        ("agreement with the unpruned model", "", f"{result.agreement:.2%}"),
    ]
    for phase, measured in result.phases.items():
        teacher_ms, slim_ms, ratio = (
            format_interval(figures, ".4g") for figures in (measured.teacher_ms, measured.slim_ms, measured.ratio)
        )
        rows.append((f"{phase}, ms", teacher_ms, f"{slim_ms} ({ratio} of the unpruned)"))
    table = "\n".join(f"| {label} | {before} | {after} |" for label, before, after in rows)
    fingerprint = result.environment.fingerprint
    how = ", ".join(f"{key} {value}" for key, value in to_json(timed).items())
    on_hub = base is not None and base.count("/") == 1 and base[0] not in "./~" and not Path(base).exists()
    front = ["library_name: transformers" if "transformers" in loads_with else "library_name: pytorch"]
    front += [f"base_model: {base}"] if on_hub else []
    if result.verdict is Verdict.SIMULATED:
        origin = "These milliseconds come from a simulated device; nothing was measured."
    else:
        origin = "These are medians with 95 % bootstrap intervals; both models were measured in interleaved rounds."
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
        f"Verdict: **{result.verdict}** ({result.reason}).",
        "",
        "| | unpruned | slim |",
        "|---|---|---|",
        table,
        "",
        f"{origin} They hold for {how}, on {fingerprint['name']} with torch {fingerprint['torch']}. Another device, "
        "shape or version has other latencies.",
        "",
        "```python",
        loads_with,
        "```",
        "",
    ]
    return signed("\n".join(lines))
