"""The progress of a long command: times that fit, and that tell of the pace it has now."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from ml2o_dist.runtime.progress import PLAIN_EVERY_S, RECENT, StepDisplay

FIGURES = "meta-loss -0.1234  best validation -0.1234 (step 100)  1,600 steps/s  16 workers 97% busy"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def shown(width, title="tune baselines"):
    """What is on a terminal of this width after 120 of 200 steps: lines without escape codes."""
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=width, height=20, color_system=None, legacy_windows=False)
    with StepDisplay(console, title, 200, 100, clock) as display:
        for step in range(101, 121):
            clock.now += 30
            display.update(step, FIGURES)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "")
    return [line.rstrip() for line in last.splitlines() if line.strip()]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_times_are_whole_whatever_the_width(width):
    bar, figures = shown(width)[-2:]
    assert re.search(r"tune baselines [━╸╺ ]+ 120/200 \d:\d\d:\d\d left 40:00$", bar)
    assert figures == (FIGURES if width > len(FIGURES) else FIGURES[: width - 1] + "…")


def left_after(seconds, total=100):
    """The time left that plain lines give after steps that took so many seconds each."""
    stream, clock = io.StringIO(), Clock()
    display = StepDisplay(Console(file=stream, width=200), "train", total, 0, clock)
    display.update(0)
    for step, each in enumerate(seconds, 1):
        clock.now += each
        display.update(step)
        display.update(step)  # a validation, of the same step
    return stream.getvalue().splitlines()[-1].rpartition("left ")[2]


def test_the_time_left_follows_the_recent_pace_and_forgets_the_slow_start():
    assert left_after([]) == "?"
    assert left_after([60]) == f"{60 * 99 // 60}:00"  # nothing better is known
    assert left_after([60, 11]) == "17:58"  # 98 steps of 11 s, not of 35.5
    assert left_after([600, *[20] * 5]) == "31:20"  # 94 of 20 s
    assert left_after([600, *[20] * 30, *[12] * RECENT]) == "11:48"  # 59 of 12 s
    assert left_after([20] * 100) == "0:00"


def test_plain_lines_come_every_ten_seconds_and_at_the_end():
    stream, clock = io.StringIO(), Clock()
    display = StepDisplay(Console(file=stream, width=200), "compare", 50, 0, clock)
    for step in range(1, 51):
        clock.now += PLAIN_EVERY_S / 8
        display.update(step)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [
        *[f"{step}/50" for step in range(1, 51, 9)],
        "50/50",
    ]


def test_the_last_plain_line_comes_again_only_with_other_figures_or_after_ten_seconds():
    stream, clock = io.StringIO(), Clock()
    display = StepDisplay(Console(file=stream, width=200), "steps", 9, 0, clock)
    for figures in ["1 of 2"] * 5 + ["2 of 2"] * 5:
        display.update(9, figures)
        clock.now += 0.5
    clock.now += PLAIN_EVERY_S
    display.update(9, "2 of 2")
    assert [line.split("  ")[1] for line in stream.getvalue().splitlines()] == ["1 of 2", "2 of 2", "2 of 2"]


def test_a_quiet_command_shows_nothing():
    stream = io.StringIO()
    with StepDisplay(Console(file=stream, quiet=True, force_terminal=True), "compare", 2) as display:
        display.update(2)
    assert stream.getvalue() == ""
