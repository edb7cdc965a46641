"""The script that starts MLflow: what it asks for, by which names it answers, and where passwords are seen."""

from __future__ import annotations

import base64
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.files import CLUSTER, CREDENTIALS, PASSWORDS, README, mlflow_servers, options, readme_commands
from tests.tracking.postgres_server import PostgresServer
from tests.wording import says

SCRIPT = CLUSTER / "mlflow_server.sh"
EVIL = (
    "mlflow.evil.com", "mlflow.evil.com:5000", "tracking.evil.com:5000", "localhost.evil.com:5000", "evil.com",
    "localhost:5000.evil.com", "127.0.0.1.evil.com:5000", "127.0.0.1:5000.evil.com", "mlflow:5000.evil.com",
    "10.0.0.1.evil.com:5000", "mlflow.default.svc.cluster.local.evil.com:5000", "amlflow:5000", "",
)  # fmt: skip


@pytest.mark.parametrize("where", mlflow_servers())
def test_mlflow_answers_by_whole_names_only(where):
    """Asked of MLflow's own check of hosts and of origins."""
    from mlflow.server.security_utils import is_allowed_host_header, should_block_cors_request

    words = options(mlflow_servers()[where])
    allowed = words["allowed-hosts"].split(",")
    assert [name for name in EVIL if is_allowed_host_header(allowed, name)] == []
    right = {
        "compose": ["mlflow:5000", "tracking:5000", "localhost:5000", "127.0.0.1:5000"],
        "compose without a name": ["mlflow:5000", "localhost:5000", "127.0.0.1:5000"],
        "kubernetes": ["mlflow:5000", "localhost:5000", "127.0.0.1:5000"],
    }.get(where, ["10.0.0.1:5000"])
    assert [name for name in right if not is_allowed_host_header(allowed, name)] == []
    origins = words.get("cors-allowed-origins", "").split(",")
    evil = [f"http://{name}" for name in EVIL if re.fullmatch(r"[a-z0-9.-]+(:\d+)?", name)]  # what browsers send
    assert [origin for origin in evil if not should_block_cors_request(origin, "POST", origins)] == []


def test_no_file_has_a_pattern_of_hosts_or_starts_mlflow_by_itself():
    files = [file for file in CLUSTER.rglob("*") if file.is_file() and file.suffix in (".yaml", ".sh", ".md")]
    assert len(files) > 10
    for file in files:
        for line in file.read_text().splitlines():
            for name in ("--allowed-hosts=", "--cors-allowed-origins="):
                if name in line and not line.lstrip().startswith("#"):
                    assert "*" not in line.partition(name)[2], line
            if "mlflow server" in line and file != SCRIPT:
                assert not line.startswith("    "), line
    assert len(mlflow_servers()) == 4


def test_outside_of_containers_it_listens_on_one_address_alone():
    for where, command in mlflow_servers().items():
        inside = where != "README 0"  # what a container publishes is said by compose and Kubernetes
        assert (options(command)["host"] == "0.0.0.0") == inside, where


def test_the_readme_makes_the_files_that_clients_and_servers_read(tmp_path):
    commands = [command for command in readme_commands() if "ml2o-secrets $" in command or "umask 077" in command
                or command.startswith("install -d -m 700 ~/.ml2o")]  # fmt: skip
    done = subprocess.run(
        ["bash", "-euc", "\n".join(commands)], env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert done.stdout == ""
    made = {file.name: file for file in (tmp_path / ".ml2o-secrets").iterdir()}
    assert set(made) == set(PASSWORDS)
    assert len({file.read_text() for file in made.values()}) == 2
    credentials = tmp_path / ".mlflow" / "credentials"
    password = made["mlflow-password"].read_text().strip()
    assert len(password) >= 12  # MLflow takes no shorter one
    assert credentials.read_text() == CREDENTIALS.replace(PASSWORDS["mlflow-password"], password)
    for file in (*made.values(), credentials):
        assert file.stat().st_mode & 0o077 == 0
        assert file.parent.stat().st_mode & 0o077 == 0


def test_no_command_of_the_readme_has_a_password_in_it():
    for word in (word for command in readme_commands() for word in shlex.split(command, comments=True)):
        assert "--from-literal" not in word
        assert "-password=" not in word.replace("--from-file=password=", "").replace("mlflow-password", ""), word
        assert not word.startswith(("POSTGRES_PASSWORD", "PGPASSWORD", "MLFLOW_TRACKING_PASSWORD")), word
    assert "sslmode=verify-full" in README  # TLS is described for all three
    named = {word.partition("=")[0] for word in README.split("`")}
    assert {"RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"} <= named


def secrets(folder: Path, **changed: str) -> Path:
    folder.mkdir()
    for name, password in PASSWORDS.items():
        (folder / name).write_text(changed.get(name.partition("-")[0], f"{password}\n"))
    return folder


def start(folder: Path, store: str, port: int, secret: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_BACKEND_STORE_URI": store,
        "ML2O_SECRETS": str(secret),
        "TMPDIR": str(folder),
    }
    words = ["--host=127.0.0.1", f"--port={port}", f"--artifacts-destination={folder / 'artifacts'}"]
    words += [f"--allowed-hosts=mlflow:5000,127.0.0.1:{port}"]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(
            [SCRIPT, *words], env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def status(port: int, path: str, password: str = "", host: str = "") -> int:
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if password:
        asked.add_header("Authorization", "Basic " + base64.b64encode(f"ml2o:{password}".encode()).decode())
    if host:
        asked.add_header("Host", host)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(params=["sqlite", "postgres"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """MLflow by the script; gives its port and its folder."""
    password = PASSWORDS["postgres-password"]
    database = None if request.param == "sqlite" else PostgresServer(owner="mlflow", password=password)
    port = free_port()
    (tmp_path / "a%2Fb").mkdir()
    store = database.uri if database else f"sqlite:///{tmp_path}/a%252Fb/mlflow.db"
    process = start(tmp_path, store, port, secrets(tmp_path / "secrets"))
    try:
        limit = time.monotonic() + 200
        while True:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                status(port, "/health")
                break
            except OSError:
                assert time.monotonic() < limit, (tmp_path / "log").read_text()
                time.sleep(0.2)
        yield port, tmp_path
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        if database:
            database.stop()


EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_it_asks_for_the_password_keeps_it_to_itself_and_answers_by_its_names(server):
    port, folder = server
    right = PASSWORDS["mlflow-password"]
    for page in (EXPERIMENT, "/", "/api/2.0/mlflow-artifacts/artifacts", "/api/2.0/mlflow/users/get?username=ml2o"):
        assert status(port, page) == 401, page
    assert [status(port, EXPERIMENT, password) for password in (right, "wrong", f"{right}\n")] == [200, 401, 401]
    assert status(port, "/health") == 200
    assert [status(port, EXPERIMENT, right, host) for host in ("mlflow:5000", *EVIL[:-1])] == [200, *[403] * 12]
    lines = [
        file.read_bytes().decode(errors="replace")
        for file in Path("/proc").glob("[0-9]*/cmdline")
        if os.access(file, os.R_OK) and file.exists()
    ]
    assert any(str(port) in line for line in lines)
    assert not [line for line in lines if any(password in line for password in PASSWORDS.values())]
    assert not any(password in (folder / "log").read_text() for password in PASSWORDS.values())
    private = [file for file in folder.glob("tmp.*/*") if file.name in ("pgpass", "auth.ini")]
    assert private
    assert all(file.stat().st_mode & 0o077 == 0 for file in private)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
def test_clients_of_this_project_read_the_credentials_file(server, tmp_path):
    port, _ = server
    script = (
        "import mlflow\n"
        f"client = mlflow.MlflowClient('http://127.0.0.1:{port}')\n"
        "run = client.create_run(client.create_experiment('e'))\n"
        "client.log_text(run.info.run_id, 'kept', 'text.txt')\n"
        "print([file.path for file in client.list_artifacts(run.info.run_id)])\n"
    )
    home = tmp_path / "home"
    (home / ".mlflow").mkdir(parents=True)
    (home / ".mlflow" / "credentials").write_text(CREDENTIALS)
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"HOME": str(home), "NO_PROXY": "127.0.0.1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "['text.txt']", done.stderr


@pytest.mark.parametrize(
    ("store", "change", "message"),
    [
        ("sqlite:///a.db", {"mlflow": ""}, "mlflow-password"),
        ("postgresql+psycopg2://mlflow@h/mlflow", {"postgres": ""}, "postgres-password"),
        ("postgresql+psycopg2://mlflow:secret@h/mlflow", {}, "MLFLOW_BACKEND_STORE_URI ... password"),
        ("", {}, "MLFLOW_BACKEND_STORE_URI ... set"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, store, change, message):
    process = start(tmp_path, store, 1, secrets(tmp_path / "secrets", **change))
    assert process.wait(timeout=30) != 0
    said = (tmp_path / "log").read_text()
    assert says(said, message)
    assert said.count("\n") == 1
    assert "secret@" not in said
