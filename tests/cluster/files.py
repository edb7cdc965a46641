"""The files of cluster/, read as what runs them reads them, and the versions that they must name."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
README = (CLUSTER / "README.md").read_text()
LAUNCHERS = ("aws", "gcp", "onprem")
PASSWORDS = {"mlflow-password": "a password of tests", "postgres-password": r"with : and \ in it"}
"""The secret files that the servers get in tests."""

CREDENTIALS = f"[mlflow]\nmlflow_tracking_username = ml2o\nmlflow_tracking_password = {PASSWORDS['mlflow-password']}\n"
"""~/.mlflow/credentials, as the README makes it."""


def pinned(name: str) -> str:
    """Return the version of `name` in constraints.txt."""
    (version,) = re.findall(rf"(?m)^{re.escape(name)}==(\S+)$", (ROOT / "constraints.txt").read_text())
    return str(version)


def image(accelerator: str) -> str:
    """Return the name of our image, which says what is in it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return f"registry.example.com/ml2o-dist:{version}-ray{pinned('ray')}-{accelerator}"


def launcher(name: str) -> dict[str, Any]:
    """Return a cluster launcher's YAML."""
    tree: dict[str, Any] = yaml.safe_load((CLUSTER / "launcher" / f"{name}.yaml").read_text())
    return tree


@cache
def manifests(name: str) -> list[dict[str, Any]]:
    """Return the Kubernetes objects of a file; they are read once, and nobody changes them."""
    return list(yaml.safe_load_all((CLUSTER / "kubernetes" / f"{name}.yaml").read_text()))


def manifest(name: str, kind: str, called: str = "") -> dict[str, Any]:
    """Return the one object of a kind, and of a name, in a file."""
    found = [each for each in manifests(name) if each["kind"] == kind and called in ("", each["metadata"].get("name"))]
    assert len(found) == 1, (name, kind, called)
    return found[0]


def all_manifests() -> list[dict[str, Any]]:
    return [each for file in sorted((CLUSTER / "kubernetes").glob("*.yaml")) for each in manifests(file.stem)]


def compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the compose file with `variables` put in: ${NAME:-DEFAULT}, ${NAME:?MESSAGE} as docker compose has them.

    Raises:
        KeyError: a variable is asked for by ${NAME:?MESSAGE} and not there.
    """

    def value(match: re.Match[str]) -> str:
        name, kind, word = match[1], match[2], match[3]
        return variables.get(name) or word if kind == ":-" else variables[name]

    text = (CLUSTER / "mlflow-compose.yaml").read_text()
    tree: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+)(:-|:\?)([^}]*)\}", value, text))
    return tree


def mlflow_servers() -> dict[str, list[str]]:
    """Return the words of each command of ours that starts MLflow, by where it stands."""
    (container,) = manifest("mlflow", "Deployment")["spec"]["template"]["spec"]["containers"]
    found = {
        "compose": compose({"MLFLOW_NAME": "tracking"})["services"]["mlflow"]["command"],
        "compose without a name": compose({})["services"]["mlflow"]["command"],
        "kubernetes": [*container["command"], *container["args"]],
    }
    starting = [command for command in readme_commands() if "mlflow_server.sh --" in command]
    return found | {f"README {i}": _slurm(command) for i, command in enumerate(starting)}


def _slurm(command: str) -> list[str]:
    (address,) = re.findall(r"(?m)^    ADDRESS=(\S+)$", README)
    return shlex.split(command.removesuffix("&").replace("$ADDRESS", address))


def options(command: str | list[str]) -> dict[str, str]:
    """Return the --name=value and --name options of a command line."""
    words = shlex.split(command) if isinstance(command, str) else command
    pairs = (word.removeprefix("--").partition("=") for word in words if word.startswith("--"))
    return {name: value for name, _, value in pairs}


def readme_commands() -> list[str]:
    """Return the commands of the README's indented blocks, lines that end in a backslash joined."""
    return list(_commands(README))


def _commands(text: str) -> Iterator[str]:
    lines = iter(text.splitlines())
    for line in lines:
        if not line.startswith("    "):
            continue
        command = line.strip()
        while command.endswith("\\"):
            command = command[:-1] + next(lines).strip()
        yield command
