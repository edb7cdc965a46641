"""A pool of workers on the session's Ray, ended with its test."""

from __future__ import annotations

import pytest

from ml2o_dist.config import FaultSettings, ResourceSettings
from ml2o_dist.metatrain.pool import WorkerPool

RESOURCES = ResourceSettings()
FAULTS = FaultSettings(shortest_deadline_s=2)


@pytest.fixture
def pool(cluster):
    pools = []

    def make(workers, resources=RESOURCES, faults=FAULTS, stop=lambda: False):
        pools.append(WorkerPool(workers, resources, faults, stop_requested=stop))
        return pools[-1]

    yield make
    for each in pools:
        each.close()
