"""The progress display of a long command: a live line on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

PLAIN_EVERY_S = 10.0
"""Seconds between two plain lines."""

RECENT = 10
"""The time left is estimated from so many recent steps: enough for an even pace, few enough to follow a change."""


class StepDisplay:
    """Shows one counted piece of work; use it as a context manager and call `update` after each step."""

    def __init__(
        self, console: Console, title: str, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._title, self._total, self._clock = console, title, total, clock
        self._last_line, self._last_text = -math.inf, ""
        self._pace = Pace(clock(), done)
        self._live: Progress | None = None
        if console.is_terminal and not console.quiet:
            self._live = _LiveLines(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(bar_width=24),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeElapsedColumn(table_column=Column(no_wrap=True)),
                TextColumn("left {task.fields[left]}", table_column=Column(no_wrap=True)),
                console=console,
            )
            self._task = self._live.add_task(title, total=total, completed=done, figures="", left="?")

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
        now = self._clock()
        self._pace.add(now, done)
        left = _minutes(self._pace.seconds_for(self._total - done))
        if self._live:
            self._live.update(self._task, completed=done, figures=figures, left=left)
        elif not self._console.quiet:
            text = f"{self._title} {done}/{self._total}  {figures}  left {left}"
            if now - self._last_line > PLAIN_EVERY_S or (done >= self._total and text != self._last_text):
                self._last_line, self._last_text = now, text
                self._console.print(text, highlight=False)


class Pace:
    """The pace of the last `RECENT` steps. The very first one includes startup, so it counts only while it is alone."""

    def __init__(self, now: float, done: int) -> None:
        self._points = deque([(now, done)], maxlen=RECENT + 1)
        self._starting = True

    def add(self, now: float, done: int) -> None:
        """Record that `done` steps are done; no effect if this was recorded already."""
        if done <= self._points[-1][1]:
            return
        if self._starting and len(self._points) == 2:
            self._points.popleft()
            self._starting = False
        self._points.append((now, done))

    def seconds_for(self, steps: int) -> float:
        """Return the seconds that `steps` more will take at this pace; nan before the first step is done."""
        (began, first), (ended, last) = self._points[0], self._points[-1]
        return (ended - began) / (last - first) * steps if last > first else math.nan


class _LiveLines(Progress):
    """A bar with the figures below it; beside it they would leave no room for the times."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["figures"]:
                yield Text(task.fields["figures"], no_wrap=True, overflow="ellipsis")


def _minutes(seconds: float) -> str:
    return "?" if math.isnan(seconds) else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
