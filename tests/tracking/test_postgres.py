"""`mlflow server` on PostgreSQL, as a team has it: runs, versions, aliases, the lock; and what its pages show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.tracking.champion import describe_version, promote_version, rollback
from ml2o_dist.tracking.evaluation_runs import Version, log_evaluation
from ml2o_dist.tracking.registry import find_version, register_version, resolve_model
from tests.browser import browser
from tests.tracking.filled_registry import Registry
from tests.tracking.mlflow_server import MlflowServer
from tests.tracking.postgres_server import PostgresServer
from tests.tracking.rival_promotions import rival_promotions
from tests.tracking.test_evaluation_runs import EVALUATION, ROW, STANDING

__all__ = ["browser"]  # a fixture

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    database = PostgresServer()
    server = MlflowServer(tmp_path_factory.mktemp("server"), database.uri)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        database.stop()


@pytest.fixture(scope="module")
def registry(server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Three versions of `ml2o` with evaluations: 1 was champion, 2 is, 3 is the candidate."""
    registry = Registry(tmp_path_factory.mktemp("registry"), server.uri)
    for number in (1, 2, 3):
        register_version(server.uri, "ml2o", registry.artifact(number), run_id=registry.run_id, description="trained")
    promote_version(server.uri, "ml2o", 1, expected=None, note="better than tuned Adam")
    promote_version(server.uri, "ml2o", 2, expected=1, note="better than ml2o/1")
    return registry


def test_versions_aliases_and_descriptions_are_held(registry: Registry, tmp_path: Path) -> None:
    uri = registry.uri
    assert registry.aliases("ml2o") == {"champion": 2, "previous": 1, "candidate": 3}
    describe_version(uri, "ml2o", 2, "quick", "0.95 [0.93, 0.97]")
    champion = find_version(uri, "models:/ml2o@champion")
    assert champion["description"].splitlines() == ["trained", "quick: 0.95 [0.93, 0.97]"]
    assert champion["tags"]["suite.quick"] == "0.95 [0.93, 0.97]"
    weights = load_artifact(resolve_model(uri, "models:/ml2o@champion"))
    assert weights.weights_sha256 == load_artifact(registry.artifact(2)).weights_sha256
    assert rollback(uri, "ml2o") == (1, 2)
    assert rollback(uri, "ml2o") == (2, 1)
    assert registry.locks() == []


def test_of_promotions_at_one_time_one_is_made(registry: Registry) -> None:
    for number in (1, 2, 3, 4):
        register_version(registry.uri, "raced", registry.artifact(number), run_id=registry.run_id)
    registry.client.delete_registered_model_alias("raced", "candidate")
    rival_promotions(registry, "raced", processes=3, rounds=3)


def logged(uri: str) -> dict[str, str]:
    """Two versions on a suite, one of them guarded too."""
    names = {"models:/ml2o/2": 0.95, "models:/ml2o/3": 0.9, "gml2o:models:/ml2o/3": 1.2}
    rows = tuple(replace(ROW, optimizer=name, label=name, loss=ratio) for name, ratio in names.items())
    standings = tuple(
        replace(STANDING, optimizer=name, ratio=replace(STANDING.ratio, estimate=ratio))
        for name, ratio in names.items()
    )
    return log_evaluation(
        uri,
        replace(EVALUATION, rows=rows, standings=standings, cells=()),
        (),
        optimizers=names,
        identities={name: name for name in names},
        guards={"gml2o:models:/ml2o/3": "dssmg"},
        versions={name: Version("ml2o", int(name[-1])) for name in names},
        git="abc",
    )


def test_runs_are_found_and_sorted_by_tags_and_figures(registry: Registry) -> None:
    runs = logged(registry.uri)
    experiment = registry.client.get_experiment_by_name("ml2o/evaluate").experiment_id
    found = registry.client.search_runs(
        [experiment], "tags.suite = 'quick' and tags.guard = 'none'", order_by=["metrics.ratio ASC"]
    )
    assert [run.info.run_id for run in found] == [runs["models:/ml2o/3"], runs["models:/ml2o/2"]]
    assert logged(registry.uri) == runs


def test_the_registry_page_shows_the_versions_with_their_aliases(browser: Any, registry: Registry) -> None:
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.goto(f"{registry.uri}/#/models/ml2o")
    for number, alias in ((1, "previous"), (2, "champion"), (3, "candidate")):
        page.get_by_role("row").filter(has_text=f"Version {number}").filter(has_text=alias).first.wait_for(
            timeout=60_000
        )
    page.close()


def test_the_experiment_table_has_columns_to_compare_by_and_filters(browser: Any, registry: Registry) -> None:
    """MLflow 3.17 shows names and data sets at first; figures and tags are columns to be had by one click."""
    logged(registry.uri)
    experiment = registry.client.get_experiment_by_name("ml2o/evaluate").experiment_id
    page = browser.new_page(viewport={"width": 2400, "height": 1000})
    page.goto(f"{registry.uri}/#/experiments/{experiment}/runs")
    for part in ("ml2o v2 on quick", "ml2o v3 on quick", "ml2o v3 guarded on quick", "3 matching runs"):
        page.get_by_text(part).first.wait_for(timeout=60_000)
    page.get_by_role("button", name="Columns").click()
    for column in ("ratio", "mean_rank", "guard", "suite", "model_version"):
        page.get_by_text(column, exact=True).first.wait_for(timeout=30_000)
    page.keyboard.press("Escape")
    search = page.get_by_placeholder("metrics.rmse")
    search.fill("tags.guard = 'none' and tags.suite = 'quick' and metrics.ratio < 0.93")
    search.press("Enter")
    page.get_by_text("1 matching run", exact=True).wait_for(timeout=30_000)
    page.close()
