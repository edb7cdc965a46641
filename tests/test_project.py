"""The project around the package: what the wheel holds, what is pinned, what an import costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ml2o_dist
from ml2o_dist import artifact_sources
from ml2o_dist.rules import ml2o

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tree: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return tree


def requirements(project: dict[str, Any]) -> list[Requirement]:
    table = project["project"]
    texts = [*table["dependencies"], *(text for extra in table["optional-dependencies"].values() for text in extra)]
    return [Requirement(text) for text in texts]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pairs = [re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line) for line in lines]
    assert None not in pairs, f"only exact pins: {lines[pairs.index(None)]}"
    return {canonicalize_name(pair[1]): pair[2] for pair in pairs if pair is not None}


def test_every_direct_dependency_is_pinned_inside_its_range(project: dict[str, Any]) -> None:
    pinned = pins()
    for requirement in requirements(project):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        assert pinned[name] in requirement.specifier, f"{name}=={pinned[name]} is outside {requirement.specifier}"


def test_the_tests_run_with_the_pinned_versions(project: dict[str, Any]) -> None:
    """What was tested is what is pinned (a local build label such as +cpu apart)."""
    pinned = pins()
    for requirement in requirements(project):
        if requirement.name in ("timm", "open_clip_torch"):  # they want torchvision, which is as large as torch
            continue
        assert version(requirement.name).partition("+")[0] == pinned[canonicalize_name(requirement.name)]


def test_torch_is_pinned_for_everybody() -> None:
    assert pins()["torch"] == "2.13.0"  # a label such as +cpu exists on one index only


def test_the_project_itself_is_not_pinned() -> None:
    assert "ml2o-dist" not in pins()


@pytest.mark.long
def test_the_wheel_holds_what_runs_without_a_checkout(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    wanted = ["configs/digits.yaml", "tracking/pyfunc_model.py", "cli/commands.py"]
    assert [name for name in wanted if f"ml2o_dist/{name}" not in names] == []
    assert "tests/" not in names

    place, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), str(wheel)]
    subprocess.run(install, check=True, timeout=240)
    (elsewhere / "plain_loop.py").write_bytes((ROOT / "examples" / "plain_loop.py").read_bytes())
    script = "import ml2o_dist, plain_loop; plain_loop.main(steps=20); print(ml2o_dist.__file__)"
    environment = os.environ | {"PYTHONPATH": str(place), "ML2O_HOME": str(elsewhere)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(str(place))


def test_the_wheel_leaves_out_no_file_of_the_package(project: dict[str, Any]) -> None:
    """hatchling takes every file of a package that git does not ignore: nothing in ours may be ignored."""
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["ml2o_dist"]}
    files = [
        path for path in (ROOT / "ml2o_dist").rglob("*") if path.suffix in {".py", ".yaml", ".safetensors", ".json"}
    ]
    assert ROOT / "ml2o_dist" / "configs" / "digits.yaml" in files
    asked = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        input="\n".join(map(str, files)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if asked.returncode not in (0, 1):
        pytest.skip(f"not a git checkout: {asked.stderr.strip()}")
    assert asked.stdout == ""


def test_the_hot_path_imports_no_library_that_it_can_do_without() -> None:
    """Not even for the public names; and a worker whose episodes have no guard needs no solver."""
    script = (
        "import sys\n"
        "def there(*names): print(*sorted({'mlflow', 'matplotlib', 'ray.tune', *names} & set(sys.modules)))\n"
        "import ml2o_dist.metatrain.worker\nthere('scipy.optimize', 'torchjd')\n"
        "from ml2o_dist.artifact import *\nthere()\n"
        "from ml2o_dist import *\nthere()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["", "", ""]


def test_the_optimizers_of_torch_need_no_more_than_the_page_says() -> None:
    page = (ROOT / "docs" / "torch.md").read_text()
    (line,) = [line for line in page.splitlines() if "pip install torch numpy" in line]
    names = line.split("pip install ")[1].split("`")[0].split()
    assert {"torch", "safetensors"} <= set(names)
    assert not {"ray", "mlflow", "matplotlib", "scikit-learn"} & set(names)
    others = {"ray", "mlflow", "matplotlib", "sklearn", "rich", "click", "moocore", "pandas"}
    script = (
        f"import sys\nfor name in {sorted(others)}: sys.modules[name] = None\n"
        "import torch\nfrom ml2o_dist import GML2O\n"
        "p = torch.nn.Parameter(torch.ones(3))\n"
        "losses = lambda: [(p - 1).square(), (p + 1).square()]\n"
        "print(GML2O([p]).step(lambda: [each.repeat(2) for each in losses()]).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[0.0,", "4.0]"]


@pytest.mark.parametrize(
    "words", [["-c", "import ml2o_dist"], ["-m", "ml2o_dist", "--help"], ["-m", "ml2o_dist", "meta-train", "--help"]]
)
def test_a_help_text_waits_for_no_library_that_takes_seconds(words: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "ml2o_dist" in imported
    assert imported & {"torch", "ray", "mlflow", "pyarrow", "numpy", "pydantic"} == set()


def test_every_public_name_is_found_where_it_lives_and_no_other() -> None:
    assert ml2o_dist.load_artifact is artifact_sources.load_artifact
    assert ml2o_dist.ML2ORule is ml2o.ML2ORule
    assert set(ml2o_dist.__all__) == set(ml2o_dist._HOME) <= set(dir(ml2o_dist))
    for name, home in ml2o_dist._HOME.items():
        assert getattr(ml2o_dist, name) is getattr(import_module(f"ml2o_dist.{home}"), name)
    with pytest.raises(AttributeError, match=r"module 'ml2o_dist' has no attribute 'load_artefact'"):
        _ = ml2o_dist.load_artefact


def test_what_ci_calls_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"train", "test", "test-full", "check"} <= targets
    assert set(re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)) == {"check", "test"}
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
