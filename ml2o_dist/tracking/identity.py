"""The identity of a run directory's MLflow run: decided before the first call to MLflow, kept in `mlflow.json`.

The run is created with the tag `ml2o.run_key`. By this tag a resumed run finds its MLflow run again if the process was
killed after MLflow had created the run and before its id was noted.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import replacing
from ml2o_dist.runtime.reading import MIB, read_json_object

IDENTITY_FILE = "mlflow.json"
RUN_KEY_TAG = "ml2o.run_key"

_LIMIT = 4 * MIB
"""Maximum bytes of an identity file, most of which is the run's configuration."""

_log = logging.getLogger("ml2o_dist.tracking")


@dataclass(frozen=True)
class RunIdentity:
    """The identity of one MLflow run.

    Attributes:
        uri: the tracking URI without its password, which is never written to the disk.
        run_id: "" until MLflow has returned it.
        created_ms: when the run began, even if MLflow creates it later.
        config: the run's configuration, which tells it from another run in the same directory.
    """

    uri: Annotated[str, Field(max_length=2000)]
    experiment: Annotated[str, Field(max_length=500)]
    run_name: Annotated[str, Field(max_length=500)] = ""
    run_id: Annotated[str, Field(pattern=r"^[\w-]{0,200}$")] = ""
    run_key: Annotated[str, Field(pattern=r"^[\w.-]{1,200}$")] = field(default_factory=lambda: uuid.uuid4().hex)
    created_ms: Annotated[int, Field(ge=0, lt=2**62)] = field(default_factory=lambda: time.time_ns() // 1_000_000)
    config: Mapping[str, Any] = field(default_factory=dict)


_IDENTITY = TypeAdapter(RunIdentity)


def load_identity(run_dir: Path, otherwise: str = "") -> RunIdentity | None:
    """Return the identity kept in `run_dir`; None if there is none or it cannot be read.

    For an unreadable one it logs a warning that ends with `otherwise`, the consequence.
    """
    file = run_dir / IDENTITY_FILE
    try:
        return _IDENTITY.validate_python(read_json_object(file, "file", _LIMIT, within=run_dir))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        _log.warning("%s is of no run: %s%s", file, why, otherwise and f"; {otherwise}")
    except UserError as error:
        _log.warning("%s%s", error, otherwise and f"; {otherwise}")
    return None


def save_identity(run_dir: Path, identity: RunIdentity) -> None:
    """Write `identity` to `run_dir` atomically; a failed write is only logged, and the run continues."""
    try:
        with replacing(run_dir / IDENTITY_FILE) as stream:
            stream.write((json.dumps(asdict(identity), indent=1) + "\n").encode())
    except OSError as error:
        _log.warning("%s cannot be written: %s", run_dir / IDENTITY_FILE, error.strerror or error)
