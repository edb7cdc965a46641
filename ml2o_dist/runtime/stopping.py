"""Turning Ctrl-C and SIGTERM into a clear end: work is asked to stop where it can, the second signal does not ask."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from ml2o_dist.runtime.errors import Interrupted
from ml2o_dist.runtime.process_tree import descendants

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

TOGETHER_S = 0.1
"""Signals within so many seconds are one: `timeout` signals its command and then its group, some ms apart."""


class Stopped(Exception):
    """A stop was requested, and what was waited for is given up."""


@dataclass
class StopRequest:
    """Set by Ctrl-C or SIGTERM; the work looks at it between results.

    Attributes:
        signal_number: of the signal that came; 0: none.
        at_once: a signal does not wait to be looked at, but raises where the work is.
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
    """Turn SIGINT and SIGTERM into a request for the time of a `with` block; a line on stderr says that it came.

    A second signal ends the process there and then, as SIGKILL would, but with a line on stderr and exit code
    128 + signal: whatever the work waits for may never answer.

    Args:
        at_once: the first signal raises, too, until the request's `at_once` is taken back.
        last_words: say what is left of the work and how to go on; asked when a signal does not wait.
        awaited: what the work brings to an end before it stops, in words.

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
            _say(line(), before="\x1b[?25h\n")  # the cursor, which a progress bar hides
            _kill_descendants()
            os._exit(128 + number)
        if request.at_once:
            raise KeyboardInterrupt  # of another kind it would be lost where Ray looks for signals as it waits
        # Beside a progress bar, which takes back two lines when it is drawn anew.
        _say(f"stopping: waiting for {awaited}; again: at once", before="\n", after="\n")

    for number in STOP_SIGNALS:
        signal.signal(number, receive)
    try:
        yield request
    except KeyboardInterrupt:
        request.signal_number = request.signal_number or signal.SIGINT
        raise Interrupted(request.signal_number, line()) from None
    except Exception:  # imports that catch everything go on half done, and fail later in any way
        if request.at_once and request():
            raise Interrupted(request.signal_number, line()) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def own_handlers_kept() -> Iterator[None]:
    """Put the handlers back after a `with` block that sets its own; what came in between is given to ours.

    `ray.init` sets one for SIGTERM, which raises SystemExit.
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
        raise SystemExit(128 + received)  # the block was left half done, whatever our handler made of it


def _say(line: str, before: str, after: str = "") -> None:
    """Write a line to stderr, on a terminal with what is `before` and `after` it: sys.stderr may be in use just now."""
    with suppress(OSError):  # nobody reads it, which must not be what the work ends of
        whole = f"{before}ml2o: {line}\n{after}" if os.isatty(2) else f"ml2o: {line}\n"
        os.write(2, whole.encode())


@contextmanager
def sigterm_kept_from_children() -> Iterator[None]:
    """Let processes that are started in a `with` block, and what those start, never get SIGTERM.

    It is blocked in them, which they inherit, as Ray itself does with SIGINT: who asks us to end asks all of our
    processes at once, and we can end in order only with those that work for us. Only where they are started with a
    `preexec_fn`, as Ray's are: other children do not come by here.
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
    """Kill what this process has started and what that has: some of Ray's agents outlive their parents (Ray 2.60).

    Only where there is a /proc; elsewhere it is left to Ray.
    """
    for pid in descendants([os.getpid()]):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def exit_on_signals(code: int) -> None:
    """Let a signal that comes while the process is ending anyway end it at once, with its own exit code."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        os._exit(code)

    for number in STOP_SIGNALS:
        signal.signal(number, leave)
