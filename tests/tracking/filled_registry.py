"""A registry with one run in it, artifacts beside it, and versions that are quickly made where no file is asked for."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from ml2o_dist.artifact import save_artifact
from ml2o_dist.config import RuleSettings
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from ml2o_dist.tracking.registry import list_versions
from ml2o_dist.tracking.store import connect, ensure_experiment
from tests.tracking.empty_store import new_store

RULE = RuleSettings(hidden=4)


class Registry:
    """At `uri`, else in an sqlite file in `folder`."""

    def __init__(self, folder: Path, uri: str = "") -> None:
        self.folder = folder
        self.uri = uri or new_store(folder)
        self.client = connect(self.uri)
        self.experiment_id = ensure_experiment(self.client, self.uri, "ml2o/meta-train")
        self.run_id = self.new_run()

    def new_run(self) -> str:
        return str(self.client.create_run(self.experiment_id).info.run_id)

    def artifact(self, number: int) -> Path:
        """Write an artifact whose weights `number` determines; return its file."""
        state = {name: tensor + number / 8 for name, tensor in ML2ONetwork(RULE).state_dict().items()}
        return save_artifact(self.folder / f"run{number}", state, RULE, {"config_hash": f"hash{number}"}).path

    def make_versions(self, model: str, count: int) -> None:
        """Make versions 1 to `count` of a new model, without files."""
        self.client.create_registered_model(model)
        for number in range(1, count + 1):
            self.client.create_model_version(model, source=f"/nowhere/{number}", description=f"trained {number}")

    def aliases(self, model: str) -> dict[str, int]:
        return {alias: entry["version"] for entry in list_versions(self.uri, model) for alias in entry["aliases"]}

    def tags(self, model: str, version: int) -> dict[str, str]:
        return dict(self.client.get_model_version(model, str(version)).tags)

    def locks(self) -> list[str]:
        """Name the registered models that are locks."""
        names = [registered.name for registered in self.client.search_registered_models()]
        return [name for name in names if name.endswith(".lock")]

    def make_older(self, name: str, seconds: float) -> None:
        """Set back the time at which an sqlite store stamped a registered model."""
        with sqlite3.connect(self.folder / "mlflow.db") as database:
            change = "UPDATE registered_models SET creation_time = creation_time - ? WHERE name = ?"
            assert database.execute(change, (int(seconds * 1000), name)).rowcount == 1
