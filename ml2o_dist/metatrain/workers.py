"""The rollout workers as Ray actors: started, found dead, replaced, within a budget and above a floor."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ml2o_dist.config import PlacementSettings, ResourceSettings
from ml2o_dist.metatrain.capacity import check_capacity, check_labels, cluster_total, free_room
from ml2o_dist.metatrain.quarantine import Quarantine
from ml2o_dist.metatrain.worker_loss import LOST, reason
from ml2o_dist.runtime.cluster import check_own_ray
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.stopping import Stopped

POLL_S = 0.2
"""Seconds between two checks whether a stop was requested."""

BUDGET_S = 3600.0
"""`resources.max_restarts` limits the replacements per this time: a crash loop ends the run, a lost node does not."""

log = logging.getLogger(__name__)


class PoolError(Exception):
    """The pool cannot go on; the run ends with a checkpoint."""


@dataclass(eq=False)
class Worker:
    """One actor. `pid` and `node` (Ray's name) are known once it is up; its replacement keeps `number`, from 1."""

    actor: Any
    number: int
    pid: int = 0
    node: str = ""

    def __str__(self) -> str:
        return f"worker {self.number} (pid {self.pid})" if self.pid else f"worker {self.number}"


class Workers:
    """`count` actors of a class whose `where()` returns pid and node; a lost one is replaced under the same number.

    Attributes:
        up, idle: workers that have answered, and those among them without a task.
        starting: workers that have not answered yet, by the reference of their answer.
        restarts: workers replaced so far.
    """

    def __init__(
        self, actor_class: type, count: int, resources: ResourceSettings, stop_requested: Callable[[], bool]
    ) -> None:
        """Start the workers and wait until all, or `resources.start_workers`, are up; the others join later.

        Raises:
            UserError: the cluster has no room for them, or they do not come up in `resources.start_timeout_s`.
            Stopped: a stop was requested meanwhile.
        """
        self._class = actor_class
        self._resources = resources
        self._replaced_at: deque[float] = deque()
        self._quarantine = Quarantine()
        self._short_since = math.inf
        self.restarts = 0
        self.up: list[Worker] = []
        self.idle: list[Worker] = []
        self.starting: dict[Any, Worker] = {}
        check_capacity(resources.at_start(count), resources, cluster_total(resources.custom), "the cluster")
        check_labels(resources.labels, "resources.labels")
        try:
            for number in range(1, count + 1):
                self._start(number)
            self._await_start(resources.at_start(count), stop_requested)
        except BaseException:
            self.close()
            raise

    @property
    def enough(self) -> bool:
        """Whether at least `resources.min_workers` are up."""
        return len(self.up) >= self._resources.min_workers

    def close(self) -> None:
        """End all workers; Ray itself kills a process that does not answer within some seconds."""
        for worker in [*self.up, *self.starting.values()]:
            ray.kill(worker.actor)
        self.up, self.idle, self.starting = [], [], {}

    def replace(self, worker: Worker, cause: str) -> None:
        """End `worker` and start one in its place, which is idle once it answers.

        Raises:
            PoolError: more workers had to be replaced than the budget allows.
        """
        ray.kill(worker.actor)
        if worker in self.up:
            self.up.remove(worker)
        if worker in self.idle:
            self.idle.remove(worker)
        self.count_loss(cause)
        if worker.node and self._quarantine.lost(worker.node) and self._avoided():
            log.warning("node %s loses workers again and again: none is started there for a time", worker.node[:8])
        self._start(worker.number)

    def count_loss(self, cause: str) -> None:
        """Count the loss of a process against the budget; raise PoolError if the budget is spent."""
        now = time.monotonic()
        self._replaced_at.append(now)
        while now - self._replaced_at[0] > BUDGET_S:
            self._replaced_at.popleft()
        if len(self._replaced_at) > self._resources.max_restarts:
            raise PoolError(
                f"{len(self._replaced_at)} workers were lost within an hour, "
                f"resources.max_restarts={self._resources.max_restarts}; the last: {cause}"
            )
        self.restarts += 1

    def started(self, future: Any) -> None:
        """Process the answer of a worker that was starting; replace the worker if it died."""
        worker = self.starting.pop(future)
        try:
            self._come_up(worker, future)
        except LOST as error:
            self.replace(worker, f"{worker}: {reason(error)}")

    def check_floor(self) -> None:
        """Warn once while too few workers are up; raise PoolError when this has lasted too long."""
        check_own_ray()
        resources, now = self._resources, time.monotonic()
        if self.enough:
            self._short_since = math.inf
            return
        missing = f"{len(self.up)} workers are up, resources.min_workers={resources.min_workers}"
        if self._short_since == math.inf:
            self._short_since = now
            log.warning("%s: waiting up to %g s for more; %s", missing, resources.start_timeout_s, free_room(resources))
        elif now - self._short_since > resources.start_timeout_s:
            raise PoolError(
                f"{missing}, and no other came up in resources.start_timeout_s={resources.start_timeout_s:g}: "
                f"{free_room(resources)}"
            )

    def _start(self, number: int) -> None:
        actor = ray.remote(self._class).options(**actor_options(self._resources, self._avoided())).remote()
        self.starting[actor.where.remote()] = Worker(actor, number)

    def _avoided(self) -> list[str]:
        """Return the nodes in quarantine; none if no other node could take a worker."""
        avoided, share = self._quarantine.avoided(), self._resources
        if not avoided:
            return []
        wanted = {"CPU": share.num_cpus, "GPU": share.num_gpus, **share.custom}
        others = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in avoided)
        able = any(all(node["Resources"].get(kind, 0.0) >= each for kind, each in wanted.items()) for node in others)
        return avoided if able else []

    def _come_up(self, worker: Worker, future: Any) -> None:
        worker.pid, worker.node = ray.get(future)
        self.up.append(worker)
        self.idle.append(worker)

    def _await_start(self, wanted: int, stop_requested: Callable[[], bool]) -> None:
        """Wait until `wanted` workers are up."""
        limit, total = time.monotonic() + self._resources.start_timeout_s, len(self.starting)
        while len(self.up) < wanted:
            if stop_requested():
                raise Stopped
            ready, _ = ray.wait(list(self.starting), num_returns=1, timeout=POLL_S)
            for future in ready:
                worker = self.starting.pop(future)
                try:
                    self._come_up(worker, future)
                except LOST as error:
                    raise UserError(f"{worker} died while it started: {reason(error)}") from error
            if len(self.up) < wanted and not ready and time.monotonic() > limit:
                raise UserError(
                    f"only {len(self.up)} of workers={total} could be placed in resources.start_timeout_s="
                    f"{self._resources.start_timeout_s:g}: {free_room(self._resources)}; ask for fewer workers"
                )


def actor_options(share: PlacementSettings, avoided: Sequence[str] = ()) -> dict[str, Any]:
    """Return the options with which Ray starts one of our processes and does not restart it by itself.

    If this process has a placement group, the new one starts in it; else Ray spreads the processes over the nodes that
    have the labels asked for and are not `avoided`.
    """
    group = get_current_placement_group()
    labels = dict(share.labels)
    if avoided:
        labels["ray.io/node-id"] = f"!in({', '.join(avoided)})"
    where: dict[str, Any] = {"scheduling_strategy": "SPREAD", "label_selector": labels or None}
    if group is not None:
        where = {"scheduling_strategy": PlacementGroupSchedulingStrategy(group)}
    share_of = {"num_cpus": share.num_cpus, "num_gpus": share.num_gpus, "resources": dict(share.custom)}
    return {**share_of, **where, "max_restarts": 0, "max_task_retries": 0}
