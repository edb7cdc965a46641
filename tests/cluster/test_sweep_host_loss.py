"""Worker hosts whose power is cut during a sweep, others that come: every trial ends, at the weights of a calm one."""

from __future__ import annotations

import pytest

from tests.cluster.ray_cluster import RayCluster
from tests.cluster.training import leaves_nothing
from tests.cluster.trials import Sweep, calm_best, trials_on

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

TRIALS, STEPS, EVERY = 4, 120, 4
"""A trial for each CPU of two workers."""

LENGTH = (f"meta_steps={STEPS}", "horizon=[60]", f"validation.every={EVERY}")


def test_trials_of_hosts_that_die_go_on_from_their_checkpoints_on_hosts_that_are_added(network, tmp_path):
    shared = network.folder / "shared"
    ray = RayCluster(network, "kuberay", shared=shared)
    first, second = ray.add(1), ray.add(2)
    ray.await_nodes(3)
    settings = [f"meta_train.{each}" for each in LENGTH]
    sweep = Sweep(ray, shared, f"trials={TRIALS}", *settings, "tracking.uri=sqlite:////home/ray/mlflow.db")
    sweep.await_that(lambda: sum(len(steps) > 1 for steps in sweep.reports().values()) == TRIALS)
    lost = trials_on(second)
    assert (len(lost), len(trials_on(first) - lost)) == (2, 2)
    ray.end(2)  # SIGKILL of all it runs, at once
    third = ray.add(3)
    sweep.await_that(lambda: trials_on(third) == lost)
    before = sweep.reports()
    sweep.await_that(lambda: all(len(sweep.reports()[trial]) > len(before[trial]) for trial in lost))
    ray.add(4)
    ray.await_nodes(4)
    ray.end(3)  # the same trials again, though `retries` is 1
    answer = sweep.answer()
    assert [trial["state"] for trial in answer["trials"]] == ["finished"] * TRIALS
    assert list(sweep.reports().values()) == [list(range(0, STEPS + 1, EVERY))] * TRIALS  # no step twice, none left out
    assert answer["best"]["weights_sha256"] == calm_best(answer, tmp_path, *LENGTH)
    leaves_nothing(ray)
