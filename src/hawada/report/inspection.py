"""What `stage=inspect` shows: readable in 80 columns, and whole where it is piped into a file."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from hawada.experiment.results import InspectedGroup, InspectResult
from hawada.report.progress import console


def print_inspection(result: InspectResult, kept: Sequence[str]) -> None:
    """Print the groups, a summary of every kind, and what keeps units.

    Args:
        result: the result of `stage=inspect`.
        kept: sentences about layers that keep units.
    """
    gates = "gates as trained" if result.trained else "gates as they start"
    table = Table(title=f"{len(result.groups)} groups, {gates}", title_justify="left", box=None)
    table.add_column("group", overflow="fold")
    table.add_column("kind", no_wrap=True)
    for name in ("units", "open", "least", "mean", "most"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in result.groups:
        figures = (f"{value:.2f}" for value in (group.least, group.mean, group.most))
        table.add_row(group.name, group.kind, f"{group.units:,}", f"{group.open:,}", *figures)
    console.print(table)
    console.print()
    by_kind: dict[str, list[InspectedGroup]] = {}
    for group in result.groups:
        by_kind.setdefault(group.kind, []).append(group)
    for kind, groups in by_kind.items():
        units, opened = sum(group.units for group in groups), sum(group.open for group in groups)
        console.print(f"{kind}: {len(groups)} groups, {units:,} units, {opened:,} of them open")
    console.print(
        f"The model has {result.params:,} parameters and {result.macs:,} multiply-accumulates per input; half of every "
        f"width leaves {result.half.params:.0%} and {result.half.macs:.0%} of them."
    )
    for sentence in kept:
        console.print(escape(f"{sentence}."))
