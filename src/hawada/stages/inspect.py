"""Shows the groups that would be gated: shapes, and the statistics of trained gates where there are some."""

from __future__ import annotations

from rich.table import Table

from hawada.adapters import group_table
from hawada.core.gates import Student
from hawada.experiment import Run
from hawada.report import console
from hawada.stages.export import load_student
from hawada.workspace import open_stage

SHOWN_COLUMNS = ("group", "kind", "units", "gated_at", "min", "mean", "max", "open")


def run_inspect(run: Run) -> None:
    """Print one row per group; writes nothing."""
    subject, _, _ = open_stage(run.settings("train"), run)
    trained = run.is_finished("train") and not run.different_keys("train")
    model = subject.adapter.skeleton()
    student = load_student(subject, model) if trained else Student(model, subject.gated_groups, subject.new_gate)
    rows = group_table(student)
    table = Table(title=f"{len(rows)} groups" + (", gates as trained" if trained else ", gates as they start"))
    for name in SHOWN_COLUMNS:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right", no_wrap=name == "group")
    for row in rows:
        table.add_row(
            *(f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in SHOWN_COLUMNS)
        )
    console.print(table)
