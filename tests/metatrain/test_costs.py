"""Deadlines against their definition."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ml2o_dist.config import FaultSettings
from ml2o_dist.metatrain.costs import Costs
from ml2o_dist.metatrain.episode import failed_episode
from ml2o_dist.metatrain.schedule import Key, training_items
from tests.metatrain.settings import small


def test_the_deadline_follows_the_measured_cost_and_doubles():
    costs = Costs(FaultSettings(deadline_factor=10, shortest_deadline_s=0.5, first_deadline_s=40))
    item = training_items(small(), 0, "cpu")[0]
    assert [costs.allowed(item, n) for n in range(3)] == [40, 80, 160]
    steps = item.spec.horizon * item.spec.instances
    result = replace(failed_episode(""), seconds=0.2 * steps, inner_steps=steps)
    costs.learn(item, result)
    assert costs.allowed(item, 1) == pytest.approx(2 * 10 * 0.2 * steps)
    costs.learn(item, replace(result, seconds=1e-6))
    assert costs.allowed(item, 0) == pytest.approx(10 * 0.2 * steps)
    longer = replace(item, spec=replace(item.spec, horizon=3 * item.spec.horizon))
    assert costs.allowed(longer, 0) == pytest.approx(3 * 10 * 0.2 * steps)
    assert costs.allowed(replace(item, key=Key(0, 0, "validate")), 0) == 40
