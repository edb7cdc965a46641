"""Where MLflow keeps things: which URI it is, and that a useless one is refused at once and in one line."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
import sqlalchemy
from mlflow.exceptions import MlflowException, RestException

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking.registry import register_version, resolve_model
from ml2o_dist.tracking.store import (
    StoreAway,
    answering,
    connect,
    ensure_experiment,
    is_refusal,
    is_temporary,
    redacted,
    refused,
    resolve_tracking_uri,
    store_exists,
)
from tests.tracking.filled_registry import Registry
from tests.wording import says


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("ML2O_HOME", raising=False)


def test_the_default_is_sqlite_in_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_tracking_uri("", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("ML2O_HOME", str(tmp_path / "home"))
    assert resolve_tracking_uri() == f"sqlite:///{tmp_path}/home/mlflow.db"


def test_the_setting_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert resolve_tracking_uri("", tmp_path) == "http://there:5000"
    assert resolve_tracking_uri("https://here", tmp_path) == "https://here"


def test_a_relative_sqlite_path_is_resolved_against_home(tmp_path: Path) -> None:
    assert resolve_tracking_uri("sqlite:///a/b.db", tmp_path) == f"sqlite:///{tmp_path}/a/b.db"
    assert resolve_tracking_uri("sqlite:////abs/b.db", tmp_path) == "sqlite:////abs/b.db"


@pytest.mark.parametrize("uri", ["postgresql://u:p@host/db", "postgresql+psycopg2://host/db", "databricks"])
def test_other_stores_pass(uri: str, tmp_path: Path) -> None:
    assert resolve_tracking_uri(uri, tmp_path) == uri


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "mlruns", "/tmp/mlruns", "ftp://host", "sqlite:///", "http:"])
def test_what_mlflow_does_not_serve_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking\.uri is .*sqlite:///") as refusal:
        resolve_tracking_uri(uri, tmp_path)
    assert "\n" not in str(refusal.value)


def test_the_refusal_names_the_variable_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:/x")
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI is 'file:/x'"):
        resolve_tracking_uri("", tmp_path)


def test_a_file_that_is_no_database_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is a text file, not a database")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"mlflow\.db'.*sqlite file"):
        connect(f"sqlite:///{tmp_path}/mlflow.db")
    assert time.monotonic() - start < 5


def test_a_folder_where_the_database_should_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be opened.*Is a directory"):
        connect(f"sqlite:///{tmp_path}")


def test_a_database_host_that_refuses_is_reported_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9"):
        connect("postgresql://user:secret@127.0.0.1:9/db")
    assert time.monotonic() - start < 5


def test_passwords_are_not_shown() -> None:
    assert redacted("postgresql://user:secret@host:1/db") == "postgresql://user:***@host:1/db"
    assert redacted("sqlite:////a/b.db") == "sqlite:////a/b.db"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A store that was created before, which takes seconds."""
    return Registry(tmp_path_factory.mktemp("filled"))


UNQUOTED = sqlalchemy.make_url("sqlite:////a%3Fb").database == "/a?b"
"""SQLAlchemy 2.1 and later."""

HOMES = ["%2F", "a%2Fb", "a?b", "a#b", "a b", "ä", "[x]", "a%b", "a%%25b", "a;b&c=d", "%3f?%"]


@pytest.mark.parametrize("name", HOMES)
def test_a_home_of_any_name_is_reached_and_nothing_else(name: str, tmp_path: Path, filled: Registry) -> None:
    home = tmp_path / "homes" / name
    home.mkdir(parents=True)
    shutil.copyfile(filled.folder / "mlflow.db", home / "mlflow.db")
    if "?" in name and not UNQUOTED:
        with pytest.raises(UserError, match=r"install sqlalchemy>=2\.1"):
            resolve_tracking_uri("", home)
        return
    uri = resolve_tracking_uri("", home)
    assert store_exists(uri)
    assert resolve_tracking_uri(uri) == uri
    client = connect(uri)
    experiment = ensure_experiment(client, uri, "here")
    run = client.create_run(experiment)
    client.log_text(run.info.run_id, "said", "said.txt")
    weights = filled.artifact(1)
    register_version(uri, "here", weights, experiment="here")
    assert resolve_model(uri, "models:/here/1").read_bytes() == weights.read_bytes()
    with sqlite3.connect(f"file:{quote(str(home))}/mlflow.db?mode=ro", uri=True) as database:
        assert database.execute("SELECT count(*) FROM experiments WHERE name = 'here'").fetchone() == (1,)
    assert [path.read_text() for path in (home / "mlartifacts" / "here").rglob("said.txt")] == ["said"]
    strangers = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(home)]
    assert strangers == []  # MLflow makes an empty folder of the quoted name


def test_a_new_home_of_such_a_name_gets_its_own_database(tmp_path: Path) -> None:
    home = tmp_path / ("a%2Fb?c" if UNQUOTED else "a%2Fb")
    home.mkdir()
    connect(resolve_tracking_uri("", home)).search_experiments()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [home / "mlflow.db"]


@pytest.mark.parametrize("name", ["a?b", "%2F"] if UNQUOTED else ["a?b"])
def test_a_uri_that_would_name_another_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"is %3F, a '%' is %25"):
        resolve_tracking_uri(f"sqlite:///{tmp_path}/{name}/mlflow.db")
    quoted = f"sqlite:///{tmp_path}/{quote(name)}/mlflow.db"
    assert resolve_tracking_uri(quoted) == quoted
    assert resolve_tracking_uri("sqlite:////x/mlflow.db?timeout=5") == "sqlite:////x/mlflow.db?timeout=5"


def wrapped(cause: Exception) -> MlflowException:
    """What MLflow's database layer makes of an exception."""
    try:
        try:
            raise cause
        except Exception as error:
            raise MlflowException(str(error)) from error
    except MlflowException as error:
        return error


AWAY = [
    ConnectionRefusedError("x"),
    TimeoutError("x"),
    OSError(errno.EHOSTUNREACH, "x"),
    requests.ConnectionError("x"),
    requests.Timeout("x"),
    sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("locked")),
    MlflowException("x", 10),  # TEMPORARILY_UNAVAILABLE
    MlflowException("a server that failed"),
    wrapped(requests.ConnectionError("x")),
    RestException({"error_code": "INTERNAL_ERROR", "message": "x"}),
    StoreAway("x"),
]
REFUSALS = [
    MlflowException("x", 1000),  # INVALID_PARAMETER_VALUE
    RestException({"error_code": "PERMISSION_DENIED", "message": "x"}),
    FileNotFoundError("x"),
    PermissionError("x"),
    UserError("x"),
]
FAULTS = [
    AttributeError("x"), TypeError("x"), KeyError("x"), IndexError("x"), NameError("x"), AssertionError("x"),
    RecursionError("x"), ImportError("x"), ValueError("x"), RuntimeError("x"), ZeroDivisionError("x"),
    sqlalchemy.exc.ArgumentError("x"), sqlalchemy.exc.ProgrammingError("SELECT", {}, Exception("x")),
]  # fmt: skip
WRAPPED_FAULTS = [wrapped(AttributeError("x")), wrapped(KeyError("x")), wrapped(TypeError("x"))]


@pytest.mark.parametrize("error", AWAY, ids=repr)
def test_networks_and_databases_that_fail_are_a_store_that_does_not_answer(error: Exception) -> None:
    assert (is_temporary(error), is_refusal(error)) == (True, False)
    assert "does not answer" in str(refused("http://x", error))


@pytest.mark.parametrize("error", REFUSALS, ids=repr)
def test_what_is_refused_for_good_is_not_asked_again(error: Exception) -> None:
    assert (is_temporary(error), is_refusal(error)) == (False, True)
    assert "refused" in str(refused("http://x", error))


@pytest.mark.parametrize("error", [*FAULTS, *WRAPPED_FAULTS], ids=repr)
def test_an_error_of_code_reads_as_one(error: Exception) -> None:
    assert (is_temporary(error), is_refusal(error)) == (False, False)
    with pytest.raises(UserError) as line, answering("http://x"):
        raise error
    assert not isinstance(line.value, StoreAway)
    assert "does not answer" not in str(line.value)
    assert says(str(line.value), "fault of ml2o_dist", "not of MLflow at http://x")
    assert "test_store.py, line " in str(line.value)


@pytest.mark.parametrize("kind", [requests.exceptions.InvalidURL, requests.exceptions.MissingSchema])
def test_a_uri_that_is_wrong_is_no_silence_either(kind: type[Exception]) -> None:
    assert not is_temporary(kind("x"))
    assert "does not answer" not in str(refused("http://x", kind("x")))


def test_a_full_disk_here_is_said_to_be_here() -> None:
    line = str(refused("http://x", OSError(errno.ENOSPC, "No space left on device")))
    assert says(line, "this machine", "http://x", "[Errno 28] No space left on device")
