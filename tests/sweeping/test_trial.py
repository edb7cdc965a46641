"""A trial in a placement group, as Ray Tune runs it: where its workers are, and what it goes on from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray
from ray.util import get_current_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ml2o_dist.config import ResourceSettings
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.metatrain.workers import Workers
from tests.metatrain.executing import digests, in_process, later
from tests.metatrain.settings import small


class Placed:
    """An actor that says in which group it is."""

    def where(self):
        group = get_current_placement_group()
        return group.id.hex() if group else "none", "node"


class Driver:
    """Stands for a trial: starts workers from a thread of its own, as Tune's function trials do."""

    def groups(self, count):
        from concurrent.futures import ThreadPoolExecutor

        def start():
            workers = Workers(Placed, count, ResourceSettings(), lambda: False)
            found = [worker.pid for worker in workers.up]
            workers.close()
            return found

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(start).result()


@pytest.mark.long
@pytest.mark.parametrize("head", [{}, {"CPU": 1}])
def test_the_workers_of_a_trial_are_in_its_placement_group(cluster, head):
    bundles = [bundle for bundle in (head, {"CPU": 1}, {"CPU": 1}) if bundle]
    group = placement_group(bundles, strategy="PACK")
    ray.get(group.ready(), timeout=60)
    try:
        strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
        driver = ray.remote(Driver).options(num_cpus=head.get("CPU", 0), scheduling_strategy=strategy).remote()
        assert ray.get(driver.groups.remote(2), timeout=120) == [group.id.hex()] * 2
        ray.kill(driver)
    finally:
        remove_placement_group(group)


def test_a_trial_s_group_has_room_for_all_its_processes():
    from ml2o_dist.sweeping.trial import placement

    sweep = SimpleNamespace(driver=SimpleNamespace(num_cpus=0.0))
    trial = small(workers=2, resources={"num_gpus": 0.25})
    assert placement(sweep, trial).bundles == [{"CPU": 1, "GPU": 0.25}] * 2
    replayed = small(workers=2, backward="learner", learner={"resources": {"num_cpus": 2, "num_gpus": 1}})
    assert placement(sweep, small(resources={"labels": {"market": "spot"}})).to_placement_group is not None
    sweep.driver.num_cpus = 1.0
    assert placement(sweep, replayed).bundles == [{"CPU": 1}, {"CPU": 2, "GPU": 1}, {"CPU": 1}, {"CPU": 1}]


def test_the_workers_of_a_driver_without_a_group_are_spread(cluster):
    workers = Workers(Placed, 1, ResourceSettings(), lambda: False)
    try:
        assert [worker.pid for worker in workers.up] == ["none"]
    finally:
        workers.close()


def test_weights_are_taken_over_from_another_configuration(tmp_path):
    """What population-based training does: the moments, the average and the history come along, the rates do not."""
    source = Trainer(small(meta_steps=4, checkpoint_every=4), tmp_path / "source")
    source.run(later(in_process))
    checkpoint, _ = newest_checkpoint(tmp_path / "source" / "checkpoints")
    copy = Trainer(small(meta_steps=8, learner={"lr": 0.002}), tmp_path / "copy")
    copy.take_over(checkpoint)
    assert digests(copy) == digests(source)
    assert copy.learner.version == 4
    assert [row["meta_step"] for row in copy.progress.history] == [0, 1, 2, 3, 4]
    copy.run(later(in_process))
    assert copy.learner.version == 8
    assert digests(copy) != digests(source)
    rates = [row["learning_rate"] for row in copy.progress.history if "learning_rate" in row]
    assert max(rates[4:]) < 0.002 < min(rates[:2])
