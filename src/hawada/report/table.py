"""The result on screen: one table, the verdict, and how to load the slim model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from hawada.experiment import Job
from hawada.experiment.results import Conclusion, EvaluateResult
from hawada.report.figures import format_interval, format_quality
from hawada.report.progress import console


def print_result(result: Conclusion, root: Path) -> None:
    """Print the teacher beside the slim model, the target and the verdict; for a run that ended early only the verdict.

    Args:
        result: the result of a pipeline or of `stage=evaluate`.
        root: the experiment's directory.
    """
    colour = "green" if result.verdict.is_success else "red"
    if not isinstance(result, EvaluateResult):
        console.print(f"[bold {colour}]{result.verdict}[/]: {escape(result.reason)}")
        return
    teacher, slim, ratio = result.teacher, result.slim, result.latency_ratio
    table = Table(title=escape(root.name), title_justify="left")
    for name in ("", "teacher", "slim", "slim / teacher"):
        table.add_column(name, justify="right" if name else "left")
    for label, whole, left in (("parameters", teacher.params, slim.params), ("MACs", teacher.macs, slim.macs)):
        table.add_row(label, f"{whole:,}", f"{left:,}", f"{left / whole:.3f}")
    table.add_row(
        _latency_label(result),
        format_interval(teacher.latency_ms),
        format_interval(slim.latency_ms),
        format_interval(ratio),
    )
    for phase, measured in result.phases.items():
        if phase != result.timed_as.phase:
            row = map(format_interval, (measured.teacher_ms, measured.slim_ms, measured.ratio))
            table.add_row(f"{phase} ms", *row)
    table.add_row("speed-up", "1.00x", f"{1 / ratio.median:.2f}x", "")
    metric = result.metric
    table.add_row(metric, format_quality(metric, teacher.quality), format_quality(metric, slim.quality), "")
    if metric != "agreement":
        table.add_row("agreement", "", f"{result.agreement:.2%}", "")
    if result.target_ms is not None:
        table.add_row("target", "", f"{result.target_ms:.3f} ms", f"{result.target_ratio:.3f}")
    table.add_row("verdict", "", f"[bold {colour}]{result.verdict}[/]", "")
    console.print(table)
    timed = result.timed_as
    described = f"batch {timed.batch}, {timed.dtype} on {timed.device}"
    console.print(f"{escape(result.reason)} ({described})\n\nslim model: {escape(slim.path)}", soft_wrap=True)
    code = "\n".join(f"  {line}" for line in slim.loads_with.splitlines() if line)
    console.print(escape(code), soft_wrap=True)


def _latency_label(result: EvaluateResult) -> str:
    """Name the latency after its phase, where there is more than one."""
    phase = result.timed_as.phase
    return "latency ms" if phase == "forward" else f"{phase} ms"


def print_sweep(jobs: Sequence[Job], keys: Sequence[str]) -> None:
    """Print a row for each job of a multirun: its swept values, then its result or why it failed.

    Args:
        jobs: the jobs.
        keys: the keys that were swept.
    """
    table = Table(title=f"{len(jobs)} jobs", title_justify="left")
    for name in (*keys, "verdict", "ratio", "slim ms", "quality", "agreement", "gate KD"):
        table.add_column(escape(name), justify="left" if name in (*keys, "verdict") else "right", overflow="fold")
    failures = []
    for job in jobs:
        swept, result = [escape(job.overrides.get(key, "")) for key in keys], job.result
        if job.error is not None:
            table.add_row(*swept, "[red]failed[/]")
            failures.append(", ".join(f"{key}={value}" for key, value in zip(keys, swept, strict=True)))
            failures[-1] += f" failed: {escape(' '.join(str(job.error).split()))}"
        elif isinstance(result, EvaluateResult):
            table.add_row(
                *swept,
                result.verdict,
                f"{result.latency_ratio.median:.3f}",
                f"{result.slim.latency_ms.median:.2f}",
                format_quality(result.metric, result.slim.quality),
                f"{result.agreement:.2%}",
                f"{result.kd:.4f}" if result.kd is not None else "",
            )
        else:
            table.add_row(*swept, result.verdict if isinstance(result, Conclusion) else "done")
    console.print(table)
    for failure in failures:
        console.print(failure, soft_wrap=True)
