"""Make the files of this folder anew: what the package of 2026-11-30 wrote, and hashes of what it computed.

    .venv/bin/python -m tests.made_before.make DATA_ROOT

The folder is the one of the real images (`ml2o data fetch`).

Run once, by the code of that day; the tests read these files with the code of today. Made again they would show
nothing: do so only where the old ones can no longer be right, and say why in the commit.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
HOME = Path("/tmp/ml2o-made-before")
"""The store of MLflow keeps absolute paths: the tests put it there again."""


def main() -> None:
    """Write everything."""
    from tests.made_before import figures

    torch.set_num_threads(1)  # as the tests have it: sums over threads are rounded otherwise
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    os.environ["ML2O_HOME"] = str(HOME)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ.pop("ML2O_DATA", None)
    answer = figures.whole_run(HOME)
    for name in ("weights.safetensors", "weights.json"):
        shutil.copy(HOME / "runs" / "a" / name, HERE / name)
    kept = HERE / "run"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(HOME / "runs" / "a", kept, ignore=shutil.ignore_patterns("*.png", "*.html", "spool*"))
    torch.save(figures.optimizer_states(HERE / "weights.safetensors"), HERE / "optimizers.pt")
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "mlflow.db"
        with sqlite3.connect(HOME / "mlflow.db") as source, sqlite3.connect(small) as target:
            source.backup(target)
            target.execute("VACUUM")
        (HERE / "store.db.gz").write_bytes(gzip.compress(small.read_bytes(), mtime=0))
    shutil.rmtree(HERE / "mlartifacts", ignore_errors=True)
    shutil.copytree(HOME / "mlartifacts", HERE / "mlartifacts", ignore=shutil.ignore_patterns("*.png", "*.html"))
    for described in (HERE / "mlartifacts").rglob("MLmodel"):
        described.write_text(described.read_text().replace(str(HERE.parents[1]), "/home/of/that/day"))
    found = figures.hashes(sys.argv[1]) | {"weights_sha256": answer["weights_sha256"], "cpu": figures.cpu()}
    (HERE / "hashes.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
