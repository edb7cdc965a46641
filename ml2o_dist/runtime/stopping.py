"""Turns Ctrl-C and SIGTERM into a clean end: the first signal requests a stop, the second one stops at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

import psutil

from ml2o_dist.runtime.errors import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

TOGETHER_S = 0.1
"""Signals within so many seconds count as one: `timeout` signals its command and then its group, some ms apart."""


class Stopped(Exception):
    """A stop was requested, and the work that was waited for is dropped."""


@dataclass
class StopRequest:
    """A flag that Ctrl-C or SIGTERM sets; the work checks it between results.

    Attributes:
        signal_number: number of the signal received; 0: none.
        at_once: whether a signal raises at once instead of waiting for the next check.
    """

    signal_number: int = 0
    at_once: bool = False

    def __call__(self) -> bool:
        return self.signal_number != 0

    @property
    def name(self) -> str:
        """`SIGINT` or `SIGTERM`."""
        return signal.Signals(self.signal_number).name


@contextmanager
def stop_on_signals(
    *,
    at_once: bool = False,
    last_words: Callable[[], str] = lambda: "",
    awaited: str = "what is under way",
) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a stop request for the time of a `with` block; a line on stderr reports it.

    A second signal ends the process at once, as SIGKILL would, but with a line on stderr and exit code 128 + signal,
    since the process or server that the work waits for may never answer.

    Args:
        at_once: whether already the first signal raises, until the request's `at_once` is reset.
        last_words: returns what is kept of the work and how to resume; called when a signal ends it at once.
        awaited: what the work completes before it stops, in words.

    Raises:
        Interrupted: a signal came while `at_once`.
    """
    request = StopRequest(at_once=at_once)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    first_at = 0.0

    def line() -> str:
        return "; ".join(filter(None, [f"stopped by {request.name}", last_words()]))

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal first_at
        if request() and time.monotonic() - first_at < TOGETHER_S:
            return
        again, request.signal_number = request(), number
        first_at = first_at or time.monotonic()
        if again:
            _say(line(), before="\x1b[?25h\n")  # show the cursor, which a progress bar hides
            _kill_descendants()
            os._exit(128 + number)
        if request.at_once:
            raise KeyboardInterrupt  # Ray checks for signals while it waits, and would lose any other error
        # The line breaks keep it apart from a progress bar, which erases two lines when it is redrawn.
        _say(f"stopping: waiting for {awaited}; again: at once", before="\n", after="\n")

    for number in STOP_SIGNALS:
        signal.signal(number, receive)
    try:
        yield request
    except KeyboardInterrupt:
        request.signal_number = request.signal_number or signal.SIGINT
        raise Interrupted(request.signal_number, line()) from None
    except Exception:  # an import that catches everything goes on half done, and may fail later in any way
        if request.at_once and request():
            raise Interrupted(request.signal_number, line()) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def own_handlers_kept() -> Iterator[None]:
    """Restore our signal handlers after a `with` block that sets its own; pass a SIGTERM received meanwhile to ours.

    `ray.init` sets a handler for SIGTERM that raises SystemExit.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    received = 0
    try:
        yield
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        received = signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received)
        raise SystemExit(128 + received)  # whatever our handler did, the block was left half done


def _say(line: str, before: str, after: str = "") -> None:
    """Write a line to file descriptor 2, since sys.stderr may be in use; a terminal also gets `before` and `after`."""
    with suppress(OSError):  # a closed stderr must not end the work
        whole = f"{before}ml2o: {line}\n{after}" if os.isatty(2) else f"ml2o: {line}\n"
        os.write(2, whole.encode())


@contextmanager
def sigterm_kept_from_children() -> Iterator[None]:
    """Block SIGTERM in processes that start in the `with` block, and in their descendants.

    Children inherit the blocked signal; Ray does the same with SIGINT. `timeout` or a scheduler sends SIGTERM to all of
    our processes at once, but we need our workers for a clean end. This affects only children that are started with a
    `preexec_fn`, as Ray's are; others do not run this hook.
    """
    global _kept_from_children
    _kept_from_children = True
    try:
        yield
    finally:
        _kept_from_children = False


_kept_from_children = False


def _block_sigterm() -> None:
    if _kept_from_children:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


os.register_at_fork(after_in_child=_block_sigterm)


def _kill_descendants() -> None:
    """Kill all descendants of this process: some of Ray's agents outlive their parents (Ray 2.60)."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            process.kill()


def exit_on_signals(code: int) -> None:
    """Make a signal that comes while the process is ending anyway end it at once, with exit code `code`."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        os._exit(code)

    for number in STOP_SIGNALS:
        signal.signal(number, leave)
