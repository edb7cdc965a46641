"""An sqlite store of MLflow's with its tables and nothing in them. MLflow takes seconds to make one, a copy none."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path


def new_store(folder: Path, name: str = "mlflow.db") -> str:
    """Write a store to `folder` and return its URI."""
    (folder / name).write_bytes(_content())
    return f"sqlite:///{folder}/{name}"


@functools.cache
def _content() -> bytes:
    from mlflow.tracking import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return Path(folder, "mlflow.db").read_bytes()
