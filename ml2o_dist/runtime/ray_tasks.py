"""Runs many Ray tasks, as many at once as there is room for; a failed task may be retried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml2o_dist.runtime.cluster import check_own_ray

POLL_S = 0.5
"""Seconds to wait for a task before `on_poll` is called again."""


def run_tasks(
    count: int,
    submit: Callable[[int], Any],
    on_result: Callable[[int, Any], None],
    on_error: Callable[[int, Exception, int], bool],
    on_poll: Callable[[], None],
    *,
    limit: int | None = None,
    force: bool = False,
) -> None:
    """Run the tasks 0 .. count - 1.

    An error that a callback raises ends the work and cancels the remaining tasks.

    Args:
        submit: starts a task; returns its reference.
        on_result: gets a task's number and what it returned.
        on_error: gets a task's number, what it raised (the cause, where Ray names one) and how often it has run;
            returns whether to retry it.
        on_poll: called at least twice a second.
        limit: how many run at once; None: all.
        force: whether to kill the processes of tasks that are cancelled.

    Raises:
        RayEnded: the Ray that this process has started died.
    """
    import ray

    waiting = [(index, 1) for index in range(count)]
    in_flight: dict[Any, tuple[int, int]] = {}
    try:
        while waiting or in_flight:
            while waiting and (limit is None or len(in_flight) < limit):
                index, runs = waiting.pop(0)
                in_flight[submit(index)] = index, runs
            ready, _ = ray.wait(list(in_flight), timeout=POLL_S)
            check_own_ray()
            for reference in ready:
                index, runs = in_flight.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None)
                    if on_error(index, cause if isinstance(cause, Exception) else error, runs):
                        waiting.insert(0, (index, runs + 1))
                else:
                    on_result(index, result)
            on_poll()
    finally:
        for reference in in_flight:
            ray.cancel(reference, force=force)
