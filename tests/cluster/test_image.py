"""The Dockerfile by meaning, and what a job takes along."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import yaml

from tests.cluster.files import CLUSTER, ROOT, image, pinned, readme_commands


def instructions():
    """Return (instruction, rest) of each line, those that end in a backslash joined, comments left out."""
    text = re.sub(r"(?m)^#.*\n", "", (CLUSTER / "Dockerfile").read_text())
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def of(kind):
    return [rest for instruction, rest in instructions() if instruction == kind]


def test_the_base_is_the_pinned_ray_for_cpu_and_gpu():
    assert of("ARG")[:2] == [f"RAY_VERSION={pinned('ray')}", "ACCELERATOR=cpu"]
    assert of("FROM") == ["rayproject/ray:${RAY_VERSION}-py311-${ACCELERATOR}"]


def test_all_is_installed_from_the_pinned_set():
    (install, fetch) = of("RUN")
    pips = [part for part in install.split("&&") if "pip install" in part]
    assert len(pips) == 2
    assert all("-c constraints.txt" in part for part in pips)
    assert "-r /tmp/torch.txt" in pips[0]  # torch first: the second finds it there and takes no other build
    assert pinned("torch")
    assert {"psycopg2-binary", "boto3", ".[sweep,solvers]"} <= set(shlex.split(pips[1]))
    asked = (
        "psycopg2-binary",
        "boto3",
        "optuna",
        "cvxpy",
        "ecos",
        "quadprog",
        "qpsolvers",
    )  # the extras of torchjd, too
    assert all(pinned(name) for name in asked)
    assert fetch.startswith("ml2o data fetch")


def test_the_torch_line_of_the_constraints_is_found_as_the_image_finds_it():
    command = shlex.split(of("RUN")[0].split(">")[0])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    assert done.stdout == f"torch=={pinned('torch')}\n"


def test_what_is_copied_is_there_and_is_what_the_build_needs():
    copied = [word for rest in of("COPY") for word in rest.split() if not word.startswith("--")]
    sources = [name for name in copied if name != "./"]
    assert [name for name in sources if not (ROOT / name).exists()] == []
    assert {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "ml2o_dist", "jobs"} <= set(sources)


def test_the_readme_builds_both_images_by_the_names_that_the_files_use():
    built = {}
    for command in readme_commands():
        if command.startswith("docker build"):
            words = shlex.split(command)
            assert words[words.index("-f") + 1] == "cluster/Dockerfile"
            built[words[words.index("-t") + 1]] = [words[i + 1] for i, w in enumerate(words) if w == "--build-arg"]
    assert built == {
        image("cpu"): [],
        image("gpu"): ["ACCELERATOR=gpu", "TORCH_INDEX=https://pypi.org/simple"],
    }


def test_a_job_finds_the_tracking_server_and_a_home_that_outlives_it():
    tree = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    assert set(tree) == {"env_vars"}
    assert all(isinstance(value, str) for value in tree["env_vars"].values())
    assert set(tree["env_vars"]) == {"ML2O_HOME", "MLFLOW_TRACKING_URI", "OMP_NUM_THREADS"}


@pytest.mark.parametrize("needed", ["ml2o_dist", "jobs", "constraints.txt"])
def test_what_a_job_needs_is_not_left_out_of_its_upload(needed):
    lines = (ROOT / ".rayignore").read_text().splitlines()
    assert not any(line.strip("/") == needed for line in lines)
    assert ".git/" in lines
    assert ".venv/" in lines
