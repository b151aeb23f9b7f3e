"""Live progress on the terminal: a bar with the remaining time and the current figures."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress as RichProgress, TextColumn, TimeRemainingColumn

console = Console(highlight=False)


class Progress:
    """The progress bar of one stage, to be used as a context manager.

    Args:
        stage: the name of the stage.
        total: the number of steps; `done` fills the bar when the work ends sooner.
    """

    def __init__(self, stage: str, total: int) -> None:
        self._bar = RichProgress(
            TextColumn("[bold]{task.description:>9}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[text]}"),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(stage, total=total, text="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Show a text about the current step."""
        self._bar.update(self._task, text=text)

    def step(self, text: str | None = None, **figures: float | None) -> None:
        """Count one step as done, and show a text, or figures by name."""
        written = "  ".join(f"{name} {value:.3g}" for name, value in figures.items() if value is not None)
        self._bar.update(self._task, advance=1, text=written if text is None else text)

    def skip(self, steps: int) -> None:
        """Count so many steps that an earlier run has done."""
        self._bar.update(self._task, advance=steps)

    def done(self) -> None:
        """Fill the bar, because the work ended before its last step."""
        self._bar.update(self._task, completed=self._bar.tasks[0].total)
