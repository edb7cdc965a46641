"""The task sets by name, without their data."""

from __future__ import annotations

from ml2o_dist.problems.image_names import IMAGE_SETS, PAIRS


def task_sets() -> list[str]:
    """Return the names of all task sets."""
    return [*PAIRS, "multimnist3", "eight", "eightdigits", *IMAGE_SETS.registered()]
