"""The compose file of the tracking server, by the Compose specification and by meaning."""

from __future__ import annotations

import re

import pytest
import yaml
from compose_spec import PyCompose

from tests.cluster.files import CLUSTER, compose, image, options

VARIABLES = {"POSTGRES_PASSWORD": "secret", "MLFLOW_BIND": "10.0.0.9", "MLFLOW_NAME": "tracking"}


@pytest.mark.parametrize("variables", [VARIABLES, {"POSTGRES_PASSWORD": "secret"}])
def test_the_file_fits_the_specification(variables):
    tree = PyCompose.from_yaml(yaml.safe_dump(compose(variables)))
    tree.validate()
    assert set(tree.service_names()) == {"mlflow", "postgres"}


def test_the_specification_can_refuse():
    tree = compose(VARIABLES)
    tree["services"]["mlflow"]["depends_on"]["postgres"]["condition"] = "service_well"
    with pytest.raises(ValueError, match="service_well"):
        PyCompose.from_yaml(yaml.safe_dump(tree))


def test_no_password_is_in_the_file_and_without_one_it_does_not_start():
    with pytest.raises(KeyError, match="POSTGRES_PASSWORD"):
        compose({})
    environment = compose(VARIABLES)["services"]["postgres"]["environment"]
    assert environment["POSTGRES_PASSWORD"] == "secret"


def test_the_server_runs_as_measured_on_the_database_beside_it():
    services = compose(VARIABLES)["services"]
    server, database = services["mlflow"], services["postgres"]
    words, environment = options(server["command"]), server["environment"]
    assert server["image"] == image("cpu")
    assert server["command"][:2] == ["mlflow", "server"]
    assert (words["workers"], environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"]) == ("1", "false")
    user, password, host, port, name = re.fullmatch(
        r"postgresql\+psycopg2://(\w+):(\w+)@(\w+):(\d+)/(\w+)", environment["MLFLOW_BACKEND_STORE_URI"]
    ).groups()
    assert host in services
    assert port == "5432"
    made = database["environment"]
    assert (user, password, name) == (made["POSTGRES_USER"], made["POSTGRES_PASSWORD"], made["POSTGRES_DB"])
    assert server["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_ports_hosts_and_volumes_fit():
    tree = compose(VARIABLES)
    server = tree["services"]["mlflow"]
    words = options(server["command"])
    assert server["ports"] == [f"10.0.0.9:5000:{words['port']}"]
    assert compose({"POSTGRES_PASSWORD": "x"})["services"]["mlflow"]["ports"] == ["127.0.0.1:5000:5000"]
    assert {"mlflow", "mlflow:5000", "tracking:5000", "localhost:*"} <= set(words["allowed-hosts"].split(","))
    mounted = [volume.split(":") for service in tree["services"].values() for volume in service["volumes"]]
    assert {name for name, _ in mounted} == set(tree["volumes"])
    assert words["artifacts-destination"] in {path for _, path in mounted}
    uri = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())["env_vars"]["MLFLOW_TRACKING_URI"]
    assert uri.removeprefix("http://") in words["allowed-hosts"].split(",")
    # MLflow's pages send their searches with an origin, which it refuses unless it is told of it.
    assert {uri, "http://tracking:5000"} <= set(words["cors-allowed-origins"].split(","))
