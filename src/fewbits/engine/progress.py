"""Progress of long work: a silent default, and a bar with the time left."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """What the engine calls; the base class stays silent. Totals are in units of work, one per unit and sweep."""

    def start(self, total: int, forecast: str) -> None:
        """`total` units of work are ahead; `forecast` says what memory they will take."""

    def working(self, name: str) -> None:
        """A unit is being processed."""

    def part(self, fraction: float) -> None:
        """How much of the current unit is done, 0 to 1."""

    def advance(self) -> None:
        """The current unit is finished."""

    def stop(self) -> None:
        """All done, or interrupted."""


class Bar(Progress):
    """A rich progress bar on standard error, with elapsed and remaining time."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._task: Any = None
        self._done = 0

    def start(self, total: int, forecast: str) -> None:
        self._bar.console.print(forecast, style="dim")
        self._task = self._bar.add_task("quantizing", total=total)
        self._bar.start()

    def working(self, name: str) -> None:
        self._bar.update(self._task, description=name or "model")

    def part(self, fraction: float) -> None:
        self._bar.update(self._task, completed=self._done + min(max(fraction, 0.0), 1.0))

    def advance(self) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done)

    def stop(self) -> None:
        self._bar.stop()
