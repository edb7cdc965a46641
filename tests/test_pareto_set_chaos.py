"""A Pareto set whose driver or an expert's rank is killed, one that is stopped, and its page in a real browser."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ml2o_dist.paretoset.saved_set import FILE
from tests.browser import browser
from tests.test_chaos import started_with, until

__all__ = ["browser"]  # a fixture

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]
CONFIG = str(Path(__file__).parent / "small_pareto_set.yaml")
WORDS = ["--config", CONFIG, "--run-dir", "runs/k", "--json", "--set", "experts.ranks=2", "--set", "start.ranks=2",
         "--set", "comparators=[soup,epo,phn-ls]", "--set", "divisions=2",
         "--set", "start.checkpoint_every=50", "--set", "experts.checkpoint_every=20"]  # fmt: skip


def drive(home, *words):
    """Start the command in a process of its own; everything it starts carries `home` in its environment."""
    command = [sys.executable, "-m", "ml2o_dist", "pareto-set", "train", "--address", "local", *words]
    with open(home / "stderr", "a") as errors:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "ML2O_HOME": str(home)}
        )


def ended_well(home, child):
    output, _ = child.communicate(timeout=600)
    assert child.returncode == 0, (home / "stderr").read_text()
    answer = json.loads(output)
    fronts = {each["approach"]: (each["test"], each["steps"], each["failures"]) for each in answer["approaches"]}
    until(lambda: not started_with(home), 60, lambda: started_with(home))
    return answer["weights_sha256"], fronts


def kill_all(home):
    """Kill everything that a killed driver has left."""
    for pid in started_with(home):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not started_with(home), 60)


def steps(home, name):
    """Return at which steps a training has checkpoints."""
    return sorted(path.name for path in (home / "runs" / "k").glob(f"*/{name}/step_*"))


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """An undisturbed run: (its home, weights and fronts)."""
    home = tmp_path_factory.mktemp("calm")
    return home, ended_well(home, drive(home, *WORDS))


@pytest.mark.parametrize("moment", ["expert_2", "phn-ls"])
def test_a_killed_driver_is_gone_on_with_to_the_same_result(calm, tmp_path, moment):
    child = drive(tmp_path, *WORDS)
    try:
        until(lambda: steps(tmp_path, moment) or child.poll() is not None, 400)
        assert child.poll() is None, (tmp_path / "stderr").read_text()
    finally:
        child.kill()
        child.wait()
    kill_all(tmp_path)
    assert not (tmp_path / "runs" / "k" / FILE).exists()
    assert ended_well(tmp_path, drive(tmp_path, "--run-dir", "runs/k", "--resume", "--json")) == calm[1]


def test_a_killed_rank_is_replaced_and_the_result_is_the_same(calm, tmp_path):
    child = drive(tmp_path, *WORDS)
    try:
        until(lambda: steps(tmp_path, "expert_1") or child.poll() is not None, 400)
        ranks = [pid for pid, line in started_with(tmp_path).items() if b"RayTrainWorker" in line]
        assert ranks
        os.kill(ranks[0], signal.SIGKILL)
        assert ended_well(tmp_path, child) == calm[1]
    finally:
        child.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on_and_leaves_no_process(tmp_path, number, code):
    child = drive(tmp_path, *WORDS)
    try:
        until(lambda: steps(tmp_path, "start") or child.poll() is not None, 300)
        child.send_signal(number)
        assert child.wait(timeout=120) == code, (tmp_path / "stderr").read_text()
    finally:
        child.kill()
    said = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert said.startswith(f"ml2o: stopped by {number.name}; ")
    assert said.endswith(f"go on with: ml2o pareto-set train --run-dir {tmp_path}/runs/k --resume")
    until(lambda: not started_with(tmp_path), 60, lambda: started_with(tmp_path))


def test_the_dial_shows_what_was_measured(calm, browser):
    home, (_, fronts) = calm
    front, _, _ = fronts["pwe"]
    page = browser.new_page(viewport={"width": 1280, "height": 1400})
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto((home / "runs" / "k" / "report.html").as_uri())
    for ray, losses in zip(front["rays"], front["losses"], strict=True):
        page.locator("input.dial").nth(0).evaluate(
            "(dial, value) => { dial.value = value; dial.dispatchEvent(new Event('input')); }", ray[0]
        )
        shown = [float(page.locator(f"#loss-{t}").inner_text()) for t in (0, 1)]
        assert shown == pytest.approx(losses, abs=1e-3)
        assert float(page.locator("#preference-1").inner_text()) == pytest.approx(ray[1], abs=0.006)
    assert not wrong
    page.screenshot(path=str(home / "page.png"), full_page=True)
    page.close()
