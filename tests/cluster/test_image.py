"""The Dockerfile by meaning, and what a job takes along."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster import lock_requirements
from tests.cluster.files import CLUSTER, ROOT, image, pinned, readme_commands


def instructions():
    """Return (instruction, rest) of each line, those that end in a backslash joined, comments left out."""
    text = re.sub(r"(?m)^#.*\n", "", (CLUSTER / "Dockerfile").read_text())
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def of(kind):
    return [rest for instruction, rest in instructions() if instruction == kind]


KINDS = ("cpu", "gpu")


def test_the_base_is_the_pinned_ray_for_cpu_and_gpu():
    assert of("ARG")[:2] == ["ACCELERATOR=cpu", "ACCELERATOR"]  # an ARG before FROM is unknown after it
    *bases, chosen = of("FROM")
    assert chosen == "base-${ACCELERATOR}"
    found = {name: base.partition("@")[0] for base, _, name in (line.split() for line in bases)}
    assert found == {f"base-{kind}": f"rayproject/ray:{pinned('ray')}-py311-{kind}" for kind in KINDS}


def test_all_is_installed_with_hashes_and_the_package_itself_without_an_index():
    (install, fetch) = of("RUN")
    packages, itself = [shlex.split(part) for part in install.split("&&") if "pip install" in part]
    assert {"--require-hashes", "--only-binary=:all:", "cluster/requirements-${ACCELERATOR}.txt"} <= set(packages)
    assert {"--no-index", "--no-deps", "--no-build-isolation", "."} <= set(itself)
    assert fetch.startswith("ml2o data fetch")
    copied = {word for rest in of("COPY") for word in rest.split()}
    assert {f"cluster/requirements-{kind}.txt" for kind in KINDS} | {"cluster/mlflow_server.sh"} <= copied
    assert os.access(CLUSTER / "mlflow_server.sh", os.X_OK)


def locked(kind):
    """Return version and sha256 of each package of an image, by its canonical name."""
    header, *lines = (CLUSTER / f"requirements-{kind}.txt").read_text().splitlines()
    assert header == f"# python cluster/lock_requirements.py {kind}"
    found = {}
    for line in lines:
        name, version, digest = re.fullmatch(r"(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})", line).groups()
        assert canonicalize_name(name) not in found
        found[canonicalize_name(name)] = version, digest
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_images_packages_are_the_pinned_ones(kind):
    text = (ROOT / "constraints.txt").read_text()
    pins = {canonicalize_name(name): version for name, version in re.findall(r"(?m)^(\S+)==(\S+)$", text)}
    found = {name: version for name, (version, _) in locked(kind).items()}
    cuda = {name for name in found if re.match("nvidia-|cuda-|triton$", name)}  # torch's own, for GPUs
    assert bool(cuda) == (kind == "gpu")
    assert {name: version for name, version in found.items() if name not in cuda} == {
        name: pins[name] for name in found if name not in cuda
    }


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_the_image_asks_for_and_all_that_it_needs_is_locked(kind):
    """`pip install --require-hashes` ends where a package that another needs is not in the file."""
    found = locked(kind)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    waiting = [Requirement(text) for text in (*project["dependencies"], *extras["sweep"], *extras["solvers"])]
    waiting += [Requirement(text) for text in lock_requirements.ASKED if not text.startswith(".")]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        assert name in found, requirement
        assert requirement.specifier.contains(found[name][0], prereleases=True), requirement
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                needs = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue  # the solvers, and what builds the package, are not in every environment
            if name == "torch":
                continue  # this environment's is of another build
            for text in needs:
                need = Requirement(text)
                if need.marker is None or need.marker.evaluate({"extra": extra}):
                    waiting.append(need)


def test_both_images_take_the_same_files_but_for_torch():
    cpu, gpu = locked("cpu"), locked("gpu")
    assert {name for name in cpu if cpu[name] != gpu[name]} == {"torch"}
    assert cpu["torch"][0] == gpu["torch"][0] == pinned("torch")


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
