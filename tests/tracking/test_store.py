"""Where MLflow keeps things: which URI it is, and that a useless one is refused at once and in one line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ml2o_dist.errors import UserError
from ml2o_dist.tracking.store import connect, redacted, resolve_tracking_uri


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
    with pytest.raises(UserError, match=r"mlflow\.db' is not an sqlite file"):
        connect(f"sqlite:///{tmp_path}/mlflow.db")
    assert time.monotonic() - start < 5


def test_a_folder_where_the_database_should_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened: Is a directory"):
        connect(f"sqlite:///{tmp_path}")


def test_a_database_host_that_refuses_is_reported_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9"):
        connect("postgresql://user:secret@127.0.0.1:9/db")
    assert time.monotonic() - start < 5


def test_passwords_are_not_shown() -> None:
    assert redacted("postgresql://user:secret@host:1/db") == "postgresql://user:***@host:1/db"
    assert redacted("sqlite:////a/b.db") == "sqlite:////a/b.db"
