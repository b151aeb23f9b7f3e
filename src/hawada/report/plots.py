"""Figures as PNG files, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hawada.experiment.results import Stairs

COLUMNS = 2  # of panels


def plot_staircases(path: Path, stairs: Sequence[Stairs], title: str) -> None:
    """Draw milliseconds over widths in a panel for each kind of site, and mark the widths behind which a step begins.

    Args:
        path: the path of the PNG file.
        stairs: the staircases.
        title: the title of the whole figure.
    """
    rows = max(1, math.ceil(len(stairs) / COLUMNS))
    figure = Figure(figsize=(5 * COLUMNS, 3.2 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for index, stair in enumerate(stairs):
        axes = figure.add_subplot(rows, COLUMNS, index + 1)
        axes.plot(stair.widths, stair.ms, marker=".", linewidth=1)
        times = dict(zip(stair.widths, stair.ms, strict=True))
        axes.plot(stair.ends, [times[width] for width in stair.ends], "o", fillstyle="none", color="tab:red")
        for width in stair.ends:
            axes.annotate(str(width), (width, times[width]), textcoords="offset points", xytext=(0, 6), fontsize=7)
        axes.set(title=stair.site, xlabel=f"{stair.unit} units kept", ylabel="ms")
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
