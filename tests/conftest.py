"""What every test stands on: one thread, folders of the session's own, and real image data where there is some."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# Set before anything imports torch, Ray or MLflow, all of which read the environment once.
_SESSION = Path(tempfile.mkdtemp(prefix="ml2o-tests-"))
atexit.register(shutil.rmtree, _SESSION, ignore_errors=True)
(_SESSION / "home").mkdir()
os.environ.update(
    HOME=str(_SESSION / "home"),  # no test writes into the user's home
    RAY_TMPDIR=str(_SESSION),  # nor joins a Ray that runs here for something else
    ML2O_CACHE=str(_SESSION / "cache"),  # built once for the session; subprocesses share it
    OMP_NUM_THREADS="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_prestart_worker_first_driver="0",  # a worker that nobody uses costs a second of a core
    RAY_worker_niceness="0",  # Ray starts workers at 15: beside any other load they would hardly run
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_HUB_OFFLINE="1",  # a name that is not on this machine is not looked for elsewhere
)

import pytest  # noqa: E402
import torch  # noqa: E402

from ml2o_dist.problems.image_files import RAW_FILES  # noqa: E402
from tests.tracking.empty_store import new_store  # noqa: E402

torch.set_num_threads(1)


def _find_real_data() -> Path | None:
    """Return the first folder that holds every raw file: ML2O_DATA, else `../shared/data` beside the repository."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    files = [file.path for splits in RAW_FILES.values() for pair in splits.values() for file in pair]
    for root in filter(None, (os.environ.get("ML2O_DATA"), str(shared))):
        if all((Path(root) / file).is_file() for file in files):
            return Path(root).absolute()
    return None


_REAL_DATA = _find_real_data()


@pytest.fixture(scope="session")
def real_data_root() -> str:
    """The folder of the real MNIST and Fashion-MNIST; the test is skipped where there is none."""
    if _REAL_DATA is None:
        pytest.skip("no real image data in ML2O_DATA or ../shared/data")
    return str(_REAL_DATA)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh ML2O_HOME with an empty store of runs; neither image data nor a tracking server is set."""
    monkeypatch.setenv("ML2O_HOME", str(tmp_path))
    monkeypatch.delenv("ML2O_DATA", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    new_store(tmp_path)
    return tmp_path


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set ML2O_CACHE to an empty folder, in which no cell has run: tmp_path/cache."""
    monkeypatch.setenv("ML2O_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn into and not rendered: for tests of pages that do not look at their pictures."""

    def savefig(figure: object, stream: IO[Any], *, format: str, **settings: object) -> None:
        stream.write('<svg viewBox="0 0 1 1"></svg>' if format == "svg" else b"not rendered")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray with 4 CPUs, one for the whole session of this process."""
    import ray

    from ml2o_dist.runtime.cluster import one_start_at_a_time

    with one_start_at_a_time():
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of real data, and skip them where there is none; put the files that start Ray first.

    Those take minutes: one that came last would have one core wait for the other (`--no-loadscope-reorder`).
    """
    starting = {item.path for item in items if {"cluster", "head"} & set(getattr(item, "fixturenames", ()))}
    items.sort(key=lambda item: item.path not in starting)
    for item in items:
        if "real_data_root" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real_data)
        if _REAL_DATA is None and item.get_closest_marker("real_data") is not None:
            item.add_marker(pytest.mark.skip(reason="no real image data in ML2O_DATA or ../shared/data"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests ran on real data."""

    def count(*outcomes: str) -> int:
        reports = (report for outcome in outcomes for report in terminalreporter.stats.get(outcome, []))
        return sum("real_data" in getattr(report, "keywords", ()) for report in reports)

    ran, skipped = count("passed", "failed"), count("skipped")
    where = f" (in {_REAL_DATA})" if _REAL_DATA is not None else ""
    terminalreporter.write_line(f"real image data{where}: {ran} tests ran on it, {skipped} were skipped")
