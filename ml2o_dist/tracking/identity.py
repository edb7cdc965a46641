"""Which MLflow run a run directory belongs to: decided before MLflow is first asked, kept in `mlflow.json`.

The run is created with the tag `ml2o.run_key`, so that a process that was killed after MLflow had created it, and
before it had noted the run's id, finds it again.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ml2o_dist.files import replacing

IDENTITY_FILE = "mlflow.json"
RUN_KEY_TAG = "ml2o.run_key"

_log = logging.getLogger("ml2o_dist.tracking")


@dataclass(frozen=True)
class RunIdentity:
    """What names one MLflow run.

    Attributes:
        uri: the tracking URI without a password, which never goes to the disk.
        run_id: "" until MLflow has said it.
        created_ms: when the run began, whenever MLflow hears of it.
        config: the configuration that the run is of, to tell it from another run in the same directory.
    """

    uri: str
    experiment: str
    run_name: str = ""
    run_id: str = ""
    run_key: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    config: Mapping[str, Any] = field(default_factory=dict)


def load_identity(run_dir: Path, otherwise: str = "") -> RunIdentity | None:
    """Return the identity kept in `run_dir`; None where there is none, or none that can be read.

    Of the latter it warns, and says what happens `otherwise`.
    """
    file = run_dir / IDENTITY_FILE
    try:
        return RunIdentity(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        _log.warning("%s cannot be read: %s%s", file, error, otherwise and f"; {otherwise}")
        return None


def save_identity(run_dir: Path, identity: RunIdentity) -> None:
    """Keep `identity` in `run_dir`, whole or not at all; a disk that takes nothing is only said: the run goes on."""
    try:
        with replacing(run_dir / IDENTITY_FILE) as stream:
            stream.write((json.dumps(asdict(identity), indent=1) + "\n").encode())
    except OSError as error:
        _log.warning("%s cannot be written: %s", run_dir / IDENTITY_FILE, error.strerror or error)
