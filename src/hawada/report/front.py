"""The Pareto front that one training leads to: as a table on screen and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from hawada.experiment.results import FrontPoint
from hawada.report.figures import format_interval
from hawada.report.progress import console

OBJECTIVE = "importance kept, or minus output divergence"  # what the export search maximises; `value` in its results


def print_front(points: Sequence[FrontPoint], title: str) -> None:
    """Print a row for each target: what was measured for it, and the objective that the search reached.

    Args:
        points: the points of the front.
        title: the title of the table.
    """
    table = Table(title=escape(title), title_justify="left")
    for name in ("target", "measured ratio", "slim ms", "value", "models measured", "status"):
        table.add_column(name, justify="left" if name == "status" else "right")
    for point in points:
        ratio, slim = point.measured.ratio, point.measured.candidate
        table.add_row(
            f"{point.target_ratio:g}",
            format_interval(ratio, ".3f"),
            f"{slim.median:.3g}",
            f"{point.value:.3f}",
            str(len(point.candidates)),
            point.status,
        )
    console.print(table)


def plot_front(points: Sequence[FrontPoint], path: Path, title: str) -> None:
    """Draw the search's objective over milliseconds: every model that was measured, and those that were chosen.

    Args:
        points: the points of the front.
        path: the path of the PNG file.
        title: the title of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    teacher_ms = points[0].measured.baseline.median
    tried = [candidate for point in points for candidate in point.candidates]
    axes.scatter([c.ratio.median * teacher_ms for c in tried], [c.value for c in tried], s=12, color="0.7")
    chosen = sorted(points, key=lambda point: point.measured.ratio.median)
    ms = [point.measured.ratio.median * teacher_ms for point in chosen]
    spread = [
        [(r.median - r.low) * teacher_ms for r in (p.measured.ratio for p in chosen)],
        [(r.high - r.median) * teacher_ms for r in (p.measured.ratio for p in chosen)],
    ]
    axes.errorbar(ms, [point.value for point in chosen], xerr=spread, marker="o", capsize=3)
    for point in chosen:
        axes.axvline(point.target_ratio * teacher_ms, color="0.8", linestyle=":", zorder=0)
    axes.set(xlabel="milliseconds, measured", ylabel=OBJECTIVE, title=title)
    figure.savefig(path, dpi=120)
