"""Write what the image installs, each package with its one version and the sha256 of its one file.

    python cluster/lock_requirements.py cpu     writes cluster/requirements-cpu.txt, after every change of
    python cluster/lock_requirements.py gpu     constraints.txt or of pyproject.toml's dependencies

It asks pip (Python 3.11 on Linux, x86-64: the image's) what it would install, and installs nothing. More words
are options for pip.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ASKED = (
    ".[sweep,solvers]",  # search=optuna of `ml2o sweep`, and what four of the baselines solve with
    "mlflow[auth]",  # MLflow's basic-auth app
    "psycopg2-binary",  # the MLflow server's PostgreSQL
    "boto3",  # its S3, run directories there, and the autoscaler on AWS
    "hatchling",  # builds the package itself, without asking an index
)
TORCH = "https://download.pytorch.org/whl/cpu"
"""PyPI's torch for Linux brings CUDA with it (several GB); this index has the build for CPUs."""


def lines(report: dict[str, Any], header: str) -> list[str]:
    """Return a requirements file from pip's installation report: `header`, then a package a line, in order.

    Raises:
        ValueError: a package comes without a sha256.
    """
    found = {}
    for each in report["install"]:
        if "dir_info" in each["download_info"]:  # the package itself
            continue
        name, version = each["metadata"]["name"], each["metadata"]["version"].partition("+")[0]
        digest = each["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest is None:
            raise ValueError(f"pip says no sha256 of {name} {version}")
        found[name.lower()] = f"{name}=={version} --hash=sha256:{digest}"
    return [header, *(found[name] for name in sorted(found))]


def main(kind: str, *options: str) -> None:
    """Write the file of the image for `kind`, cpu or gpu."""
    indexes = [f"--extra-index-url={TORCH}"] if kind == "cpu" else []
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report=-"]
    command += ["--only-binary=:all:", "--constraint=constraints.txt", *indexes, *options, *ASKED]
    report = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    header = f"# python cluster/lock_requirements.py {kind}"
    (ROOT / "cluster" / f"requirements-{kind}.txt").write_text("\n".join(lines(report, header)) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("cpu", "gpu"):
        sys.exit("lock_requirements.py: say cpu or gpu")
    main(*sys.argv[1:])
