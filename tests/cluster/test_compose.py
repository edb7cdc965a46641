"""The compose file of the tracking server, by the Compose specification and by meaning."""

from __future__ import annotations

import re

import pytest
import yaml
from compose_spec import PyCompose

from tests.cluster.files import CLUSTER, PASSWORDS, compose, image, options

VARIABLES = {"MLFLOW_BIND": "10.0.0.9", "MLFLOW_NAME": "tracking"}


@pytest.mark.parametrize("variables", [VARIABLES, {}])
def test_the_file_fits_the_specification(variables):
    tree = PyCompose.from_yaml(yaml.safe_dump(compose(variables)))
    tree.validate()
    assert set(tree.service_names()) == {"mlflow", "postgres"}


def test_the_specification_can_refuse():
    tree = compose(VARIABLES)
    tree["services"]["mlflow"]["depends_on"]["postgres"]["condition"] = "service_well"
    with pytest.raises(ValueError, match="service_well"):
        PyCompose.from_yaml(yaml.safe_dump(tree))


def test_passwords_are_files_and_nowhere_else():
    tree = compose(VARIABLES)
    assert tree["secrets"] == {name: {"file": f"./ml2o-secrets/{name}"} for name in PASSWORDS}
    services = tree["services"]
    assert set(services["mlflow"]["secrets"]) == set(PASSWORDS)
    assert services["postgres"]["secrets"] == ["postgres-password"]
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD_FILE"] == "/run/secrets/postgres-password"
    for service in services.values():
        named = [name for name in service["environment"] if "PASSWORD" in name or "SECRET" in name]
        assert all(name.endswith("_FILE") for name in named)
        assert not re.search(r"://[^/@]*:[^/@]*@", str(service["environment"]) + str(service.get("command")))
    text = (CLUSTER / "mlflow-compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+)", text)) == {"MLFLOW_NAME", "MLFLOW_BIND"}


def test_the_server_runs_on_the_database_beside_it():
    services = compose(VARIABLES)["services"]
    server, database = services["mlflow"], services["postgres"]
    assert server["image"] == image("cpu")
    assert server["command"][0] == "/home/ray/ml2o_dist/cluster/mlflow_server.sh"
    user, host, port, name = re.fullmatch(
        r"postgresql\+psycopg2://(\w+)@(\w+):(\d+)/(\w+)", server["environment"]["MLFLOW_BACKEND_STORE_URI"]
    ).groups()
    assert host in services
    assert port == "5432"
    made = database["environment"]
    assert (user, name) == (made["POSTGRES_USER"], made["POSTGRES_DB"])
    assert server["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_rights_are_as_few_as_can_be():
    services = compose(VARIABLES)["services"]
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
    assert services["mlflow"]["user"] == "1000:100"  # the image's
    assert "cap_add" not in services["mlflow"]
    # What PostgreSQL's image needs to make a fresh volume its own and to become the user postgres.
    assert set(services["postgres"]["cap_add"]) == {"CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"}


def test_only_mlflow_reaches_the_database_and_only_this_machine_mlflow_unless_it_is_told():
    tree = compose({})
    server, database = tree["services"]["mlflow"], tree["services"]["postgres"]
    assert server["ports"] == ["127.0.0.1:5000:5000"]
    assert "ports" not in database
    (between,) = database["networks"]
    assert tree["networks"][between] == {"internal": True}
    assert between in server["networks"]
    assert len(server["networks"]) == 2  # a port is published on one that is not internal


def test_ports_hosts_and_volumes_fit():
    tree = compose(VARIABLES)
    server = tree["services"]["mlflow"]
    words = options(server["command"])
    assert server["ports"] == [f"10.0.0.9:5000:{words['port']}"]
    assert {"mlflow:5000", "tracking:5000", "localhost:5000"} <= set(words["allowed-hosts"].split(","))
    mounted = [volume.split(":") for service in tree["services"].values() for volume in service["volumes"]]
    assert {name for name, _ in mounted} == set(tree["volumes"])
    assert words["artifacts-destination"] in {path for _, path in mounted}
    # A fresh volume takes over the owner of the folder that the image has there.
    assert f"mkdir {words['artifacts-destination']}" in (CLUSTER / "Dockerfile").read_text()
    uri = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())["env_vars"]["MLFLOW_TRACKING_URI"]
    assert uri.removeprefix("http://") in words["allowed-hosts"].split(",")
    # MLflow's pages send their searches with an origin, which it refuses unless it is told of it.
    assert {uri, "http://tracking:5000"} <= set(words["cors-allowed-origins"].split(","))
