"""What Prometheus would scrape from the node that a run's driver is on."""

from __future__ import annotations

import time
import urllib.request

import ray

from ml2o_dist.workflows.gauges import POOL_FIGURES, RunGauges


def scraped() -> dict[str, float]:
    """Our gauges of the run `scraped`, as the metrics port of this node serves them."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    ours = [line for line in lines if line.startswith("ray_ml2o_") and 'run="scraped"' in line]
    return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in ours}


def test_the_last_figures_of_a_run_are_served_with_its_name(cluster):
    gauges = RunGauges("scraped")
    gauges.set(1, {"meta_loss": 3.0, "lag": 0.0, "workers": 2.0})
    gauges.set(2, {"meta_loss": 2.5, **dict.fromkeys(POOL_FIGURES, 4.0)})
    wanted = {"ray_ml2o_meta_step": 2.0, "ray_ml2o_meta_loss": 2.5, "ray_ml2o_lag": 0.0, "ray_ml2o_workers": 4.0,
              "ray_ml2o_worker_restarts": 4.0, "ray_ml2o_repeated_episodes": 4.0}  # fmt: skip
    limit = time.monotonic() + 60
    while scraped() != wanted:
        assert time.monotonic() < limit, scraped()
        time.sleep(0.5)
