"""A set of rollout workers. When one dies, hangs or fails, its item is retried on another worker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayTaskError

from ml2o_dist.config import FaultSettings, LearnerSettings, MetaTrainSettings, ResourceSettings
from ml2o_dist.metatrain.dispatch import Batch, Dispatch, InFlight
from ml2o_dist.metatrain.episode import EpisodeResult, failed_episode, replayed
from ml2o_dist.metatrain.replays import Replays
from ml2o_dist.metatrain.schedule import WorkItem
from ml2o_dist.metatrain.worker import RolloutWorker
from ml2o_dist.metatrain.worker_loss import LOST, reason
from ml2o_dist.metatrain.workers import POLL_S, PoolError, Workers
from ml2o_dist.rules.learned import Weights
from ml2o_dist.runtime.cluster import check_own_ray
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.stopping import Stopped

log = logging.getLogger(__name__)


class WorkerPool:
    """`workers` Ray actors, each with one item in flight, in the order of `Dispatch`.

    Results come back in the order of the items, whichever worker computed them. A worker that died, or that takes far
    longer than its item's kind took so far (it hangs, or was stopped), is ended and replaced, and its item is retried.
    """

    def __init__(
        self,
        workers: int,
        resources: ResourceSettings,
        faults: FaultSettings = FaultSettings(),  # noqa: B008  # frozen
        *,
        learner: LearnerSettings | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Start the workers and wait until all are up, or as many as `resources.start_workers` says.

        If `learner` settings are given, a separate process replays the rollouts (backward=learner); else each worker
        replays its own.

        Raises:
            UserError: the cluster has no room for them, or they do not come up in `resources.start_timeout_s`.
            Stopped: a stop was requested meanwhile.
        """
        self._faults = faults
        self._stop_requested = stop_requested
        self._dispatch = Dispatch(faults)
        self._in_flight: dict[Any, InFlight] = {}
        self._rollouts: dict[InFlight, Any] = {}
        self._replays = None if learner is None else Replays(learner, faults)
        try:
            if self._replays is not None:
                self._replays.await_start(resources.start_timeout_s, stop_requested)
            self._workers = Workers(RolloutWorker, workers, resources, stop_requested)
        except BaseException:
            if self._replays is not None:
                self._replays.close()
            raise

    @classmethod
    def of(cls, settings: MetaTrainSettings, stop_requested: Callable[[], bool] = lambda: False) -> WorkerPool:
        """Start the pool that a meta-training asks for; raises what the constructor does."""
        learner = settings.learner if settings.backward == "learner" else None
        return cls(
            settings.workers, settings.resources, settings.faults, learner=learner, stop_requested=stop_requested
        )

    @property
    def alive(self) -> int:
        """How many workers are up."""
        return len(self._workers.up)

    @property
    def restarts(self) -> int:
        """How many workers were replaced so far."""
        return self._workers.restarts

    @property
    def repeated(self) -> int:
        """How many times an episode was retried: its worker was lost, it raised or it was overdue."""
        return self._dispatch.repeated

    def pids(self) -> list[int]:
        """Return the process ids of the workers that are up."""
        return [worker.pid for worker in self._workers.up]

    def begin(self, items: Sequence[WorkItem], weights: Weights) -> Callable[[], list[EpisodeResult]]:
        """Begin all items under `weights`; return a function that waits for the results, in the order of the items.

        Several batches may be in flight; all make progress while any of them is waited for. An item whose episode
        raised twice ends the run; with `faults.on_error=skip` its result is `failed_episode`. The function raises:

            Stopped: a stop was requested meanwhile.
            UserError: an episode found its settings or data wrong.
            PoolError: an episode failed otherwise, more workers had to be replaced than the budget allows, or fewer
                than `resources.min_workers` were up for `resources.start_timeout_s`.

        In each case it drops all tasks of all batches.
        """
        batch = self._dispatch.add(items, ray.put(weights))
        self._assign()
        return lambda: self._await(batch)

    def run(self, items: Sequence[WorkItem], weights: Weights) -> list[EpisodeResult]:
        """Begin all items and wait for their results; see `begin`."""
        return self.begin(items, weights)()

    def close(self) -> None:
        """End all workers; Ray itself kills a process that does not answer within some seconds."""
        self._give_up()
        self._workers.close()
        if self._replays is not None:
            self._replays.close()

    def _await(self, batch: Batch) -> list[EpisodeResult]:
        try:
            while not batch.complete:
                self._assign()
                ready = self._ready()
                if self._stop_requested():
                    raise Stopped
                check_own_ray()
                for future in ready:
                    if future in self._workers.starting:
                        self._workers.started(future)
                    elif future in self._in_flight:
                        self._land(future, self._in_flight.pop(future))
                    elif self._replays is not None and future in self._replays.under_way:  # else it was restarted
                        self._take_replay(self._replays, future)
                self._end_overdue()
                self._workers.check_floor()
        except BaseException:
            self._give_up()
            raise
        return batch.in_order()

    def _ready(self) -> list[Any]:
        """Wait for one answer and return all that are ready: a thousand workers then need few calls of `wait`."""
        asked = [*self._in_flight, *self._workers.starting]
        if self._replays is not None:
            asked += self._replays.under_way
        first, others = ray.wait(asked, num_returns=1, timeout=POLL_S)
        if not first or not others:
            return list(first)
        more, _ = ray.wait(others, num_returns=len(others), timeout=0)
        return [*first, *more]

    def _give_up(self) -> None:
        for future in self._in_flight:
            ray.cancel(future, force=False)
        self._in_flight.clear()
        self._rollouts.clear()
        if self._replays is not None:
            self._replays.give_up()
        self._dispatch.drop()
        self._workers.idle = list(self._workers.up)

    def _assign(self) -> None:
        """Start the next tasks on the idle workers.

        Start none while fewer workers are up than `resources.min_workers`, or while the replayer's queue is full.
        """
        if not self._workers.enough or (self._replays is not None and self._replays.full):
            return
        for flight in self._dispatch.assign(list(self._workers.idle), self.alive):
            self._workers.idle.remove(flight.worker)
            actor, weights, spec = flight.worker.actor, flight.task.batch.weights, flight.task.item.spec
            if self._replays is None or spec.estimator is None:
                self._in_flight[actor.run.remote(weights, spec)] = flight
            else:
                result, rollout = actor.roll_out.options(num_returns=2).remote(weights, spec)
                self._in_flight[result], self._rollouts[flight] = flight, rollout

    def _land(self, future: Any, flight: InFlight) -> None:
        """Process the end of an attempt."""
        worker, key = flight.worker, flight.task.item.key
        rollout = self._rollouts.pop(flight, None)
        try:
            result: EpisodeResult = ray.get(future)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            self._workers.idle.append(worker)
            self._raised(flight, error)
        except LOST as error:
            self._dispatch.lost(flight)
            log.warning("%s: %s is lost: %s; %s", key, worker, reason(error), flight.task.fate)
            log.debug("the whole of it: %s", error)
            self._workers.replace(worker, f"{worker}: {reason(error)}")
        else:
            self._workers.idle.append(worker)
            if self._replays is None or rollout is None or not result.finite:
                self._dispatch.finished(flight, result)
                return
            self._dispatch.rolled_out(flight, result)
            if not (flight.task.done or self._replays.has(flight.task)):  # by its backup task
                self._replays.add(flight.task, result, rollout)

    def _take_replay(self, replays: Replays, future: Any) -> None:
        """Process the end of a replay."""
        key = replays.under_way[future].task.item.key
        try:
            meta_loss, gradient = ray.get(future)
        except RayTaskError as error:
            task = replays.take(future).task
            if isinstance(error.cause, LOST):  # the host that held the rollout was lost
                log.warning("the rollout of %s is lost: %s; it runs again", key, reason(error.cause))
                self._dispatch.again(task)
            elif self._faults.on_error == "skip":
                log.warning("the replay of %s failed: %r; skipped (faults.on_error=skip)", key, error.cause)
                self._dispatch.settle(task, failed_episode(repr(error.cause)))
            else:
                raise PoolError(f"the replay of {key} failed: {error.cause!r}") from error
        except ObjectLostError as error:
            log.warning("the rollout of %s is lost: %s; it runs again", key, reason(error))
            self._dispatch.again(replays.take(future).task)
        except LOST as error:
            self._restart_replays(replays, reason(error))
        else:
            replay = replays.take(future)
            self._dispatch.settle(replay.task, replayed(replay.result, meta_loss, gradient))

    def _restart_replays(self, replays: Replays, why: str) -> None:
        """Start another replayer and retry the tasks of the last one; counts against the budget of lost workers."""
        log.warning("the process that replays is lost: %s; another one is started, what it had runs again", why)
        self._workers.count_loss(f"the process that replays: {why}")
        for replay in replays.restart():
            self._dispatch.again(replay.task)

    def _raised(self, flight: InFlight, error: RayTaskError) -> None:
        item = flight.task.item
        what = f"{item.key} ({item.spec.problem}) failed"
        if self._dispatch.raised(flight):
            if flight.task.done:  # by its backup task
                return
            again = "it runs once more, elsewhere if there is another worker"
            log.warning("%s: %r; %s", what, error.cause, flight.task.fate if flight.task.flying else again)
        elif self._faults.on_error == "skip":
            log.warning("%s twice: %r; skipped (faults.on_error=skip)", what, error.cause)
            self._dispatch.settle(flight.task, failed_episode(repr(error.cause)))
        else:
            raise PoolError(f"{what}: {error.cause!r} (twice; faults.on_error=skip goes on without it)") from error

    def _end_overdue(self) -> None:
        """Replace workers past their deadline, and the replayer if it does not answer."""
        if self._replays is not None and self._replays.overdue():
            self._restart_replays(self._replays, f"no answer in {self._faults.first_deadline_s:g} s")
        for flight, allowed in self._dispatch.end_overdue():
            key, fate = flight.task.item.key, flight.task.fate
            log.warning("%s did not end in %.0f s: %s is ended; %s", key, allowed, flight.worker, fate)
            self._in_flight = {future: each for future, each in self._in_flight.items() if each is not flight}
            self._rollouts.pop(flight, None)
            self._workers.replace(flight.worker, f"{key} did not end in time")
