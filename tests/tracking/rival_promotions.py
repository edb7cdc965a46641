"""Real processes that write the aliases of one model at the same moment, round after round."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier

from ml2o_dist.tracking.champion import ChampionChanged, promote_version, rollback
from tests.tracking.filled_registry import Registry
from tests.tracking.quick_processes import quick_processes

_start: Barrier
"""In the rivals: where they wait for each other."""


def rival_promotions(registry: Registry, model: str, processes: int, rounds: int) -> None:
    """Check that of promotions at one moment, all against the same champion, one is made, and no rollback is lost.

    The model needs `processes` + 1 versions, none of them promoted.
    """
    context = quick_processes()
    champion = None
    with ProcessPoolExecutor(processes, context, _keep, (context.Barrier(processes),)) as pool:
        for _ in range(rounds):
            rivals = [version for version in range(1, processes + 2) if version != champion][:processes]
            promotions = [pool.submit(_promote, registry.uri, model, version, champion) for version in rivals]
            (winner,) = (version for version, task in zip(rivals, promotions, strict=True) if task.result(120))
            expected = {"champion": winner} | ({"previous": champion} if champion else {})
            assert registry.aliases(model) == expected
            assert registry.tags(model, winner)["promoted_over"] == str(champion or "")
            champion = winner
        swaps = [pool.submit(rollback, registry.uri, model) for _ in range(3)]
        pairs = [task.result(120) for task in swaps]
    before = expected["champion"], expected["previous"]
    assert sorted(pairs) == sorted([before[::-1], before, before[::-1]])
    assert registry.aliases(model) == {"champion": before[1], "previous": before[0]}
    assert registry.locks() == []


def _keep(start: Barrier) -> None:
    global _start
    _start = start


def _promote(uri: str, model: str, version: int, champion: int | None) -> bool:
    """Return whether `version` was promoted; if not, the champion must have been another one by then."""
    _start.wait(120)
    try:
        promote_version(uri, model, version, expected=champion, note=f"against {champion}")
    except ChampionChanged:
        return False
    return True
