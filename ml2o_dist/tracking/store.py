"""The store of MLflow's runs and versions: one URI, checked before MLflow uses it, so that nothing hangs.

MLflow is imported only when a store is opened; resolving the URI does not need it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import ssl
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import home_folder

_SQLITE = "sqlite:///"
_SERVERS = ("http", "https")
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_ALLOWED = "sqlite:///FILE, http(s)://HOST:PORT, postgresql://..., mysql://..., mssql://... or databricks"

_PROBE_S = 5.0
_DEFAULTS = {
    # MLflow's defaults (120 s, 7 retries) block for minutes if no server answers; callers here retry themselves.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # standard output is for `--json`
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Environment variables for MLflow, set unless the user has set them."""

_TEMPORARY = frozenset(
    ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "ABORTED")
)

_CODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    RecursionError,
    NotImplementedError,
    TypeError,
)
"""Errors of MLflow's own code or of a database driver, which MLflow also wraps as INTERNAL_ERROR."""

_NETWORK_ERRNOS = frozenset(
    getattr(errno, name)
    for name in ("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "EADDRNOTAVAIL", "ESTALE")
    if hasattr(errno, name)
)

_NETWORKS = frozenset(("requests", "urllib3", "http", "httpx", "botocore", "boto3", "google", "azure", "pyarrow"))
"""Packages through which MLflow reaches servers and object stores; their errors are errors of the store."""

_DATABASES = frozenset(("sqlalchemy", "sqlite3", "psycopg2", "psycopg", "pymysql", "MySQLdb", "pyodbc"))

_CONNECTION_NAMES = frozenset(("OperationalError", "InterfaceError", "TimeoutError", "DisconnectionError"))
"""Errors of a database that is away or locked; its other errors are caused by the request."""

_SECRET = re.compile(r"(?<=[?&])([^=&]*(?:password|passwd|pwd|token|secret)[^=&]*)=[^&]*", re.IGNORECASE)
"""A parameter of a URI that must be neither shown nor written down."""


_log = logging.getLogger("ml2o_dist.tracking")


class StoreAway(UserError):
    """A store that does not answer; a later retry may help."""


def resolve_tracking_uri(setting: str = "", home: Path | None = None) -> str:
    """Return the absolute tracking URI: `setting`, else MLFLOW_TRACKING_URI, else sqlite in `home`.

    A relative sqlite path is resolved against `home` (None: `home_folder()`), never against a job's temporary
    working directory.

    Raises:
        UserError: a kind of URI that MLflow no longer serves (`file:`, a plain path) or does not know.
    """
    home = home or home_folder()
    source = "tracking.uri" if setting else "MLFLOW_TRACKING_URI"
    uri = setting or os.environ.get("MLFLOW_TRACKING_URI", "") or f"{_SQLITE}mlflow.db"
    if uri.startswith(_SQLITE):
        path = uri.removeprefix(_SQLITE)
        if not path or path == ":memory:":
            raise UserError(f"{source} is {uri!r}: name a file, sqlite:///mlflow.db")
        _check_quoting(source, uri, path)
        return _SQLITE + (path if path.startswith("/") else str(PurePosixPath(_quoted(home), path)))
    kind = _kind(uri)
    if uri == "databricks" or kind == "databricks" or ("://" in uri and (kind in _SERVERS or kind in _DATABASE_PORTS)):
        return uri
    what = "MLflow keeps nothing in plain folders any more" if kind in ("file", "") else f"unknown kind {kind!r}"
    raise UserError(f"{source} is {uri!r}: {what}; give {_ALLOWED}")


def tracking_uri_to_keep(setting: str = "") -> str:
    """Return `resolve_tracking_uri(setting)` for a `setting` that will be written down with a run.

    Raises:
        UserError: it contains a password.
    """
    uri = resolve_tracking_uri(setting)
    if redacted(setting) != setting:
        raise UserError(
            f"tracking.uri is {redacted(uri)!r}: the password would be written into the run's configuration; "
            "give such a URI in the environment variable MLFLOW_TRACKING_URI"
        )
    return uri


def store_exists(uri: str) -> bool:
    """Tell whether there is a store to read: False only for a missing sqlite file, which is not created."""
    file = _sqlite_file(uri)
    return file is None or file.exists()


def connect(uri: str) -> Any:
    """Return an MlflowClient for runs and versions at `uri`; creates a missing sqlite file (2-3 s).

    Raises:
        UserError: a file that cannot be written or is no sqlite file, or a database host that does not answer.
    """
    file = _sqlite_file(uri)
    if file is not None:
        _check_sqlite(file)
    else:
        _probe_database(uri)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # late: takes 2 s

    # MLflow logs schema migrations and waiting for a version at INFO; these messages do not help our users.
    for name in ("mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def ensure_experiment(client: Any, uri: str, name: str) -> str:
    """Return the id of experiment `name`, creating it if there is none.

    Artifacts of a store without a server go to an absolute folder: `mlartifacts` beside an sqlite file, in
    `home_folder()` for other databases. A server decides for itself.

    Raises:
        UserError: the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=_artifact_location(uri, name)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # else another run created it first
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"experiment {name!r} was deleted at {redacted(uri)}: `mlflow experiments restore -x "
            f"{experiment.experiment_id}` brings it back, tracking.experiment=NAME takes another one"
        )
    return str(experiment.experiment_id)


def is_temporary(error: Exception) -> bool:
    """Tell whether a later retry may help: the server did not answer or failed, but did not refuse.

    This is true only for errors of networks, databases and object stores. A bug in MLflow's client or in this package
    does not mean that the server is away.
    """
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        cause = error.__cause__ or error.__context__
        return error.error_code in _TEMPORARY and not isinstance(cause, _CODE_ERRORS)
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError | StoreAway):
        return True
    if isinstance(error, OSError) and error.errno in _NETWORK_ERRNOS:
        return True
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    packages = {package for package, _ in names}
    if packages & _DATABASES:
        return bool({name for _, name in names} & _CONNECTION_NAMES)
    # A ValueError from these packages means a wrong URL or header, unless an answer was not JSON.
    malformed = isinstance(error, ValueError) and type(error).__name__ != "JSONDecodeError"
    return bool(packages & _NETWORKS) and not malformed


def is_refusal(error: Exception) -> bool:
    """Tell whether a store, or this package, has refused a request for good."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code not in _TEMPORARY
    # PermissionError: a server's artifact folder is on another machine's disk, so a retry cannot help.
    return isinstance(error, UserError | FileNotFoundError | PermissionError) and not isinstance(error, StoreAway)


def one_line(error: Exception) -> str:
    """Return the message of `error` as one line; a long one is cut in the middle, since its end has the cause."""
    return shortened(" ".join(str(error).split()) or type(error).__name__)


def shortened(said: object) -> str:
    """Return `said` as text; a long one is cut in the middle."""
    text = str(said)
    return text if len(text) <= 240 else f"{text[:120]} ... {text[-115:]}"


def refused(uri: str, error: Exception) -> UserError:
    """Build the one-line error for a request that the store at `uri` could not fulfil."""
    shown = redacted(uri)
    if is_temporary(error):
        return StoreAway(f"MLflow at {shown} does not answer: {one_line(error)}")
    if is_refusal(error):
        return UserError(f"MLflow at {shown} refused: {one_line(error)}")
    if isinstance(error, OSError):
        return UserError(f"this machine could not do what MLflow at {shown} needs: {one_line(error)}")
    _log.info("an error of code, not of the store", exc_info=error)
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" in {Path(frame.filename).name}, line {frame.lineno}" for frame in where)
    return UserError(
        f"{type(error).__name__}{place}: {one_line(error)}: a fault of ml2o_dist or of MLflow's client, not of MLflow "
        f"at {shown}; please report it"
    )


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """Turn MLflow's exceptions in the `with` block into one line that names the store; UserErrors are not changed."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow lets SQLAlchemy's, requests' and its own errors through
        raise refused(uri, error) from error


def redacted(uri: str) -> str:
    """Return `uri` without the password it may carry, for messages, logs and files."""
    shown = _SECRET.sub(r"\1=***", uri)
    try:
        parts = urlsplit(shown)
    except ValueError:
        return shown
    if not parts.password:
        return shown
    return parts._replace(netloc=f"{parts.username}:***@{parts.netloc.rpartition('@')[2]}").geturl()


def _kind(uri: str) -> str:
    """Return the scheme without a driver: postgresql+psycopg2 -> postgresql; "" for a plain path."""
    scheme, colon, _ = uri.partition(":")
    return scheme.partition("+")[0].lower() if colon else ""


def _quoted(home: Path) -> str:
    """Return a folder's path for the URI of an sqlite file in it; only characters with a special meaning are quoted.

    Raises:
        UserError: this version of SQLAlchemy cannot open such a folder (before 2.1 it unquotes nothing).
    """
    plain = str(home)
    quoted = re.sub(r"%(?=[0-9A-Fa-f]{2})|[?]", lambda found: f"%{ord(found[0]):02X}", plain)
    for text in (plain, quoted):
        if "?" not in text and _database(_SQLITE + text) == plain:
            return text
    raise UserError(
        f"ML2O_HOME {plain!r}: the installed SQLAlchemy reaches no sqlite file in a folder with a '?' in its name: "
        "name another folder, or install sqlalchemy>=2.1"
    )


def _database(uri: str) -> str:
    """Return the path that MLflow opens for an sqlite file's URI."""
    path = uri.removeprefix(_SQLITE).partition("?")[0]
    if "%" not in path:
        return path
    from sqlalchemy import make_url  # late: only such a path needs it

    return make_url(uri).database or ""


def _check_quoting(source: str, uri: str, path: str) -> None:
    """Raise UserError if a `?` or `%` in a folder's name would be read as URI syntax."""
    path, question, query = path.partition("?")
    plain, meant = Path(path), Path(_database(uri))
    other_folder = plain != meant and plain.parent.is_dir() and not meant.exists()
    if other_folder or (question and not re.fullmatch(r"([^/=]+=[^/]*)(&[^/=]+=[^/]*)*", query)):
        raise UserError(f"{source} is {uri!r}: in an sqlite URI a '?' of a folder's name is %3F, a '%' is %25")


def _sqlite_file(uri: str) -> Path | None:
    return Path(_database(uri)) if uri.startswith(_SQLITE) else None


def _check_sqlite(file: Path) -> None:
    """Raise at once the errors that MLflow would retry for minutes."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as stream:
            head = stream.read(16)
    except FileNotFoundError:
        head = b""
    except OSError as error:
        raise UserError(f"MLflow's database {str(file)!r} cannot be opened: {error.strerror or error}") from error
    if head and head != b"SQLite format 3\0":
        raise UserError(f"MLflow's database {str(file)!r} is not an sqlite file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"MLflow's database {str(file)!r} cannot be written")


def _probe_database(uri: str) -> None:
    """Raise unless the host of a database URI takes connections: MLflow retries a refused one for minutes."""
    port = _DATABASE_PORTS.get(_kind(uri))
    if port is None:
        return
    try:
        parts = urlsplit(uri)
        address = (parts.hostname, parts.port or port)
    except ValueError as error:
        raise UserError(f"tracking.uri {redacted(uri)!r}: {error}") from error
    if address[0] is None:
        return  # a Unix socket, named in the query
    try:
        socket.create_connection((address[0], address[1]), timeout=_PROBE_S).close()
    except OSError as error:
        raise ConnectionError(f"{address[0]}:{address[1]}: {error.strerror or error}") from error


def _artifact_location(uri: str, experiment: str) -> str | None:
    file = _sqlite_file(uri)
    if file is None and _kind(uri) not in _DATABASE_PORTS:
        return None
    root = home_folder() if file is None else file.parent
    return (root / "mlartifacts" / experiment.replace("/", "-")).as_uri()
