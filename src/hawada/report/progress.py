"""Live progress on the terminal: a bar with the time left and the figures of the moment."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

console = Console(highlight=False)


class Progress:
    """One stage's bar; without a total, a spinner with a text.

    Args:
        stage: what is going on.
        total: number of steps, or None when it is not known.
    """

    def __init__(self, stage: str, total: int | None) -> None:
        self.stage = stage
        columns = [TextColumn("[bold]{task.description:>9}"), BarColumn(bar_width=24), MofNCompleteColumn()]
        columns += [TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[text]}")]
        self._bar = RichProgress(*columns, console=console, refresh_per_second=4)
        self._task = self._bar.add_task(stage, total=total, text="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Show what is being done."""
        self._bar.update(self._task, text=text)

    def step(self, **figures: float | None) -> None:
        """One step is done; show figures by name."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)
        self._bar.update(self._task, advance=1, text=text)

    def done(self) -> None:
        """Fill the bar: the work ended before its last step."""
        task = self._bar.tasks[0]
        self._bar.update(self._task, completed=task.total if task.total is not None else task.completed)
