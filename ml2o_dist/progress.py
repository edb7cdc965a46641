"""What a long command shows while it works: a live line on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0
"""Seconds between two plain lines."""


class StepDisplay:
    """Shows one counted piece of work; use it as a context manager and call `update` after each step."""

    def __init__(self, console: Console, title: str, total: int, done: int = 0) -> None:
        self._console, self._title, self._total = console, title, total
        self._began, self._first, self._last_line = time.monotonic(), done, -math.inf
        self._live: Progress | None = None
        if console.is_terminal and not console.quiet:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self._task = self._live.add_task(title, total=total, completed=done, figures="")

    def __enter__(self) -> StepDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, done: int, figures: str = "") -> None:
        """Show that `done` of the total are done; `figures` is a short text beside it."""
        if self._live:
            self._live.update(self._task, completed=done, figures=figures)
        elif not self._console.quiet and (done >= self._total or time.monotonic() - self._last_line > PLAIN_EVERY_S):
            self._last_line = time.monotonic()
            self._console.print(
                f"{self._title} {done}/{self._total}  {figures}  left {self._left(done)}", highlight=False
            )

    def _left(self, done: int) -> str:
        if done <= self._first:
            return "?"
        seconds = (time.monotonic() - self._began) / (done - self._first) * (self._total - done)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
