"""Run stages and pieces of work on Ray: as many at once as the cluster has room for, with one retry each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml2o_dist.config import ShareSettings
from ml2o_dist.paretoset.approaches import Outcome, Work, run_work
from ml2o_dist.paretoset.experts import Stage, fit_stage
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.ray_tasks import run_tasks
from ml2o_dist.runtime.stopping import Stopped

RUNS = 2
"""A failed piece is retried once, since the machine may have caused the error."""

log = logging.getLogger(__name__)

OnPoll = Callable[[], bool]
"""Called twice a second; False ends the work and cancels what is left."""


def run_stages(stages: Sequence[Stage], folder: Path, resources: ShareSettings, on_poll: OnPoll) -> None:
    """Train all `stages` as Ray Train runs, as many at once as the cluster has room for.

    Raises:
        UserError: the cluster has no room for one; RuntimeError: one has failed; Stopped.
    """
    import ray

    total = ray.cluster_resources()
    limits = []
    for stage in stages:
        ranks = stage.tuning.ranks
        for kind, each in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus)):
            have = total.get(kind, 0.0)
            if ranks * each > have:
                raise UserError(
                    f"training {stage.name} wants {ranks} ranks of {each:g} {kind}, the cluster has {have:g}: lower "
                    f"ranks or resources.num_{kind.lower()}s"
                )
            if each:
                limits.append(int(have // (ranks * each)))
    task = ray.remote(num_cpus=0, max_retries=0)(fit_stage)

    def submit(stage: Stage) -> Any:
        named = task.options(name=f"training {stage.name}")
        return named.remote(stage, folder, num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)

    failed = _run(stages, submit, lambda stage, outcome: None, min(limits, default=1), on_poll)
    if failed:
        raise RuntimeError(f"training {stages[failed[0][0]].name} failed: {failed[0][1]}")


def run_works(
    works: Sequence[Work], resources: ShareSettings, on_outcome: Callable[[Work, Outcome], None], on_poll: OnPoll
) -> list[tuple[Work, str]]:
    """Do all `works` as Ray tasks; return those that failed twice, with the reasons.

    Raises:
        UserError: a piece raised it, and the others would raise it, too; Stopped.
    """
    import ray

    task = ray.remote(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, max_retries=0)(run_work)

    def submit(work: Work) -> Any:
        return task.options(name=f"pareto set {work.name}").remote(work)

    failed = _run(works, submit, on_outcome, len(works), on_poll)
    return [(works[index], reason) for index, reason in failed]


def _run(
    pieces: Sequence[Any],
    submit: Callable[[Any], Any],
    on_outcome: Callable[[Any, Any], None],
    limit: int,
    on_poll: OnPoll,
) -> list[tuple[int, str]]:
    failed: list[tuple[int, str]] = []

    def on_error(index: int, error: Exception, runs: int) -> bool:
        if isinstance(error, UserError):
            raise error
        reason = " ".join(str(error).split())[-300:]
        if runs < RUNS:
            log.warning("%s failed: %s; it runs once more", pieces[index].name, reason)
            return True
        failed.append((index, reason))
        return False

    def poll() -> None:
        if not on_poll():
            raise Stopped

    run_tasks(
        len(pieces),
        lambda index: submit(pieces[index]),
        lambda index, outcome: on_outcome(pieces[index], outcome),
        on_error,
        poll,
        limit=limit,
        force=True,
    )
    return failed
