"""A sweep whose driver is killed goes on, one that is stopped says how to, and nothing is left or done twice."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.config_file import load_settings
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.sweeping.record import SweepRecord
from tests.browser import browser
from tests.metatrain.executing import in_process, later
from tests.test_chaos import started_with, until
from tests.test_sweep import CONFIG, metric_steps, runs_of
from tests.tracking.mlflow_server import MlflowServer

__all__ = ["browser"]  # a fixture

pytestmark = pytest.mark.long


def drive(home, *words):
    """Start the command in a process of its own; everything it starts carries `home` in its environment."""
    command = [sys.executable, "-m", "ml2o_dist", "sweep", "--address", "local", *words]
    with open(home / "stderr", "a") as errors:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "ML2O_HOME": str(home)},
            start_new_session=True,
        )


def working(home):
    """Return the living drivers, trials and workers that were started with this home."""
    ours = (b"ray::Roll", b"ray::Implicit", b"ray::meta_training", b"ml2o_dist")
    return {pid: line for pid, line in started_with(home).items() if any(name in line for name in ours)}


def trials_at_work(home):
    """The process ids of trials that train, not those of their drivers that only start."""
    return [pid for pid, line in started_with(home).items() if line.startswith(b"ray::ImplicitFunc.train")]


def reported(home):
    file = home / "runs" / "k" / "trials.jsonl"
    return [line for line in file.read_text().splitlines() if '"meta_step"' in line] if file.exists() else []


ASHA = ["--config", str(CONFIG), "--run-dir", "runs/k", "--json", "--set", "trials=12", "--set", "scheduler=asha",
        "--set", "asha={grace: 2, reduction: 2}", "--set", "meta_train.meta_steps=8",
        "--set", "space.learner.lr={loguniform: [0.0001, 0.5]}"]  # fmt: skip


def killed(home, words, after):
    """Run a sweep, or go on with one, and kill its driver after so many reports in all; return the reports."""
    child = drive(home, *words)
    try:
        until(lambda: len(reported(home)) >= after or child.poll() is not None, 400)
        assert child.poll() is None, (home / "stderr").read_text()
    finally:
        child.kill()
        child.wait()
    until(lambda: not working(home), 60, lambda: working(home))
    for pid in started_with(home):  # agents of Ray's own take their time
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [json.loads(line) for line in reported(home)]


def done(home, *words):
    """Run a sweep, or go on with one, to its end; return its answer."""
    child = drive(home, *words)
    output, _ = child.communicate(timeout=500)
    assert child.returncode == 0, (home / "stderr").read_text()
    return json.loads(output)


RESUME = ["--run-dir", "runs/k", "--resume", "--json"]


def kill_and_resume(home, words, after):
    """Run a sweep whose driver is killed after so many reports, then go on with it; (reports before, answer)."""
    return killed(home, words, after), done(home, *RESUME)


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory):
    """Twelve trials under ASHA on two CPUs, the driver killed on the way, then resumed: (home, reports, answer)."""
    home = tmp_path_factory.mktemp("killed")
    return home, *kill_and_resume(home, ASHA, 12)


@pytest.mark.timeout(1200)
def test_a_sweep_whose_driver_was_killed_goes_on_without_doing_anything_twice(killed_and_resumed, tmp_path):
    home, before, answer = killed_and_resumed
    assert [trial["trial"] for trial in answer["trials"]] == list(range(1, 13))
    states = [trial["state"] for trial in answer["trials"]]
    assert set(states) == {"finished", "stopped"}
    assert {line["trial"] for line in before} & {trial["id"] for trial in answer["trials"]}
    client, parent, nested = runs_of(home)
    assert parent.info.status == "FINISHED"
    assert sorted(nested) == list(range(1, 13))
    for trial in answer["trials"]:
        run = nested[trial["trial"]]
        assert run.info.status == "FINISHED"
        assert metric_steps(client, run) == list(range(0, trial["meta_steps"] + 1, 2))
        assert run.data.tags["state"] == trial["state"]
        assert run.data.params["learner.lr"] == str(trial["values"]["learner.lr"])
    best = answer["best"]
    settings = [f"{key}={json.dumps(value)}" for key, value in best["values"].items()]
    trainer = Trainer(
        load_settings(CONFIG.parent / "small_sweep_base.yaml", [*settings, "device=cpu", "meta_steps=8"]), tmp_path
    )
    trainer.run(later(in_process))
    if best["state"] == "finished":  # what was killed on the way has come to the weights of a calm run
        assert best["weights_sha256"] == weights_sha256(trainer.best_weights)
    assert math.isclose(min(trial["validation"] for trial in answer["trials"]), best["validation"])
    until(lambda: not started_with(home), 60, lambda: started_with(home))


@pytest.mark.timeout(900)
def test_a_search_by_optuna_whose_driver_was_killed_has_no_trial_too_many(tmp_path):
    overrides = ["trials=6", "search=optuna", "max_concurrent=2", "meta_train.meta_steps=4"]
    words = [word for override in overrides for word in ("--set", override)]
    before, answer = kill_and_resume(tmp_path, ["--config", str(CONFIG), "--run-dir", "runs/k", *words], 5)
    assert [trial["trial"] for trial in answer["trials"]] == list(range(1, 7))
    client, _, nested = runs_of(tmp_path)
    assert sorted(nested) == list(range(1, 7))
    assert all(metric_steps(client, run) == [0, 2, 4] for run in nested.values())
    ended = {line["trial"] for line in before if line["meta_step"] == 4}
    assert ended <= {trial["id"] for trial in answer["trials"]}


PBT = ["--config", str(CONFIG), "--run-dir", "runs/k", "--json", "--set", "trials=4", "--set", "scheduler=pbt",
       "--set", "pbt={quantile: 0.5, interval: 2}", "--set", "meta_train.meta_steps=8",
       "--set", "space={learner.lr: {loguniform: [0.0001, 0.5]}}"]  # fmt: skip


def history(home):
    """By what the trial was drawn as, first to last, and the meta-step: the values and the validation last reported.

    A trial's number is the order in which they began, which two processes that start at once do not always keep.
    """
    trials = SweepRecord(home / "runs" / "k").trials.values()
    return {(t.id[-1], step): (r.values, r.validation) for t in trials for step, r in t.reports.items()}


@pytest.mark.timeout(1500)
def test_pbt_whose_driver_was_killed_twice_makes_the_same_exchanges_as_one_that_was_not(tmp_path):
    """A calm sweep of the same seed is the oracle for every report, on record and in MLflow, and for the weights."""
    calm, chaos = tmp_path / "calm", tmp_path / "chaos"
    for home in (calm, chaos):
        home.mkdir()
    expected = done(calm, *PBT)
    reports = history(calm)
    assert sorted(reports) == [(drawn, step) for drawn in "0123" for step in (0, 2, 4, 6, 8)]
    rates = [{reports[drawn, step][0]["learner.lr"] for step in (2, 4, 6, 8)} for drawn in "0123"]
    assert sum(len(each) > 1 for each in rates) >= 2  # there were exchanges
    assert killed(chaos, PBT, 10)[-1]["meta_step"] == 4  # amid what follows the first exchange
    assert len(killed(chaos, RESUME, 16)) < 20
    answer = done(chaos, *RESUME)
    assert history(chaos) == reports
    assert [(trial["trial"], trial["state"]) for trial in answer["trials"]] == [(n, "finished") for n in (1, 2, 3, 4)]
    assert answer["best"]["weights_sha256"] == expected["best"]["weights_sha256"]
    client, parent, nested = runs_of(chaos)
    assert parent.info.status == "FINISHED"
    assert sorted(nested) == [1, 2, 3, 4]
    drawn = {trial["trial"]: trial["id"][-1] for trial in answer["trials"]}
    for number, run in nested.items():
        told = {}
        for key in ("learner.lr", "validation"):
            points = client.get_metric_history(run.info.run_id, key)
            assert [point.step for point in points] == [0, 2, 4, 6, 8]
            told[key] = [point.value for point in points]
        mine = [reports[drawn[number], step] for step in (0, 2, 4, 6, 8)]
        assert told == {"learner.lr": [v["learner.lr"] for v, _ in mine], "validation": [score for _, score in mine]}
    until(lambda: not started_with(chaos), 60, lambda: started_with(chaos))


@pytest.mark.timeout(1200)
def test_pbt_does_not_wait_for_a_trial_that_has_failed_and_resume_brings_it_to_its_end(tmp_path):
    child = drive(tmp_path, *PBT, "--set", "retries=0")
    try:
        until(lambda: any('"meta_step": 2' in line for line in reported(tmp_path)) or child.poll() is not None, 300)
        until(lambda: trials_at_work(tmp_path), 60)
        os.kill(trials_at_work(tmp_path)[0], signal.SIGKILL)
        output, _ = child.communicate(timeout=500)
    finally:
        child.kill()
    assert child.returncode == 3, (tmp_path / "stderr").read_text()
    trials = json.loads(output)["trials"]
    assert sorted(trial["state"] for trial in trials) == ["failed", "finished", "finished", "finished"]
    assert all(trial["meta_steps"] == 8 for trial in trials if trial["state"] == "finished")
    answer = done(tmp_path, *RESUME)
    assert [(trial["state"], trial["meta_steps"]) for trial in answer["trials"]] == [("finished", 8)] * 4
    client, _, nested = runs_of(tmp_path)
    assert all(metric_steps(client, run) == [0, 2, 4, 6, 8] for run in nested.values())


@pytest.mark.timeout(1200)
def test_mlflow_shows_the_trials_below_their_sweep(killed_and_resumed, browser, tmp_path):
    """The experiment's page in a real browser: the sweep, and after a click on it its twelve trials."""
    home, _, answer = killed_and_resumed
    server = MlflowServer(tmp_path, f"sqlite:///{home}/mlflow.db")
    server.start()
    try:
        experiment = runs_of(home)[1].info.experiment_id
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.goto(f"{server.uri}/#/experiments/{experiment}/runs")
        page.get_by_text("13 matching runs").wait_for(timeout=120_000)
        assert page.get_by_text("trial 12", exact=True).count() == 0
        page.get_by_role("row").filter(has_text="small").get_by_role("button").first.click()
        page.get_by_text("trial 12", exact=True).first.wait_for(timeout=30_000)
        for trial in answer["trials"]:
            assert page.get_by_text(f"trial {trial['trial']}", exact=True).count() == 1
        page.screenshot(path=str(tmp_path / "mlflow.png"))
        page.close()
    finally:
        server.kill()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("send", [os.kill, os.killpg])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_sweep_says_how_to_go_on_and_leaves_no_process(tmp_path, number, code, send):
    """Its own process is asked, or its whole group, as Ctrl-C, timeout, systemd and scancel do."""
    child = drive(tmp_path, *ASHA)
    try:
        until(lambda: len(reported(tmp_path)) >= 2 or child.poll() is not None, 300)
        send(child.pid, number)
        assert child.wait(timeout=120) == code, (tmp_path / "stderr").read_text()
    finally:
        child.kill()
    said = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert said.startswith(f"ml2o: stopped by {number.name}; ")
    assert said.endswith(f"go on with: ml2o sweep --run-dir {tmp_path}/runs/k --resume")
    _, parent, nested = runs_of(tmp_path)
    assert {run.info.status for run in (parent, *nested.values())} <= {"KILLED", "FINISHED"}
    until(lambda: not started_with(tmp_path), 60, lambda: started_with(tmp_path))
