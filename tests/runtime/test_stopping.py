"""What a signal does: asks, raises, or ends the process, and that whoever sets handlers of its own changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import ray
from click.testing import CliRunner

from ml2o_dist.cli import main
from ml2o_dist.runtime.errors import Interrupted
from ml2o_dist.runtime.stopping import STOP_SIGNALS, own_handlers_kept, sigterm_kept_from_children, stop_on_signals
from tests.wording import says

CONFIG = Path(__file__).parents[1] / "small_run.yaml"


def handlers():
    return [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_only_asks_and_says_so_at_once(number, capfd):
    before = handlers()
    with stop_on_signals(awaited="the end") as stop:
        assert not stop()
        signal.raise_signal(number)
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert says(said, "ml2o: stopping", "the end", "at once")
        assert stop()
        assert stop.signal_number == number
        assert stop.name == number.name
    assert handlers() == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_at_once_it_raises_with_the_last_words_until_that_is_taken_back(number):
    before = handlers()

    def work():
        with stop_on_signals(at_once=True, last_words=lambda: "nothing is lost"):
            signal.raise_signal(number)
            pytest.fail("went on")

    with pytest.raises(Interrupted, match=rf"^stopped by {number.name}.*nothing is lost$") as raised:
        work()
    assert raised.value.signal_number == number
    assert handlers() == before
    with stop_on_signals(at_once=True) as stop:
        stop.at_once = False
        signal.raise_signal(number)
        assert stop()


def test_a_signal_that_an_import_swallowed_is_what_ends_the_work():
    def work():
        with stop_on_signals(at_once=True):
            with suppress(BaseException):
                signal.raise_signal(signal.SIGTERM)
            raise RecursionError("half imported")

    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM$"):
        work()


SECOND = """
import signal, subprocess, sys
from ml2o_dist.runtime import stopping
from ml2o_dist.runtime.stopping import stop_on_signals

stopping.TOGETHER_S = 0.0
with stop_on_signals(last_words=lambda: "go on with: x", awaited="the end") as stop:
    child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(100)"],
                             stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    print(child.pid, flush=True)
    signal.raise_signal(signal.{first})
    assert stop()
    signal.raise_signal(signal.{second})
    print("went on")
"""


@pytest.mark.parametrize(
    ("first", "second", "code"), [("SIGINT", "SIGINT", 130), ("SIGTERM", "SIGTERM", 143), ("SIGINT", "SIGTERM", 143)]
)
def test_the_second_signal_ends_the_process_and_its_children_with_a_line(first, second, code):
    script = SECOND.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    asked, ended = done.stderr.splitlines()
    assert says(asked, "ml2o: stopping", "the end", "at once")
    assert says(ended, f"ml2o: stopped by {second}", "x")
    (child,) = map(int, done.stdout.split())
    limit = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_request_counts_where_nobody_reads_that_it_came():
    script = (
        "import signal\nfrom ml2o_dist.runtime.stopping import stop_on_signals\n"
        "with stop_on_signals() as stop:\n    signal.raise_signal(2)\n    raise SystemExit(7 if stop() else 8)"
    )
    command = [sys.executable, "-c", script]
    reader, writer = os.pipe()
    os.close(reader)
    assert subprocess.run(command, stderr=writer, timeout=60, check=False).returncode == 7
    os.close(writer)


def test_the_same_signal_twice_at_once_as_timeout_sends_it_only_asks(monkeypatch):
    monkeypatch.setattr("ml2o_dist.runtime.stopping.TOGETHER_S", 60.0)
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGTERM"


def blocks_sigterm(pid):
    (mask,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigBlk:")]
    return bool(int(mask.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_what_ray_starts_and_that_starts_never_gets_sigterm():
    """Ray's processes are children with a preexec_fn, which then execute another program."""
    script = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"

    def child():
        command = [sys.executable, "-c", script]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: None)

    with sigterm_kept_from_children():
        kept = child()
    other = child()
    grandchildren = [int(each.stdout.readline()) for each in (kept, other)]
    try:
        assert [blocks_sigterm(pid) for pid in (kept.pid, grandchildren[0])] == [True, True]
        assert [blocks_sigterm(pid) for pid in (os.getpid(), other.pid, grandchildren[1])] == [False] * 3
    finally:
        for each, pid in zip((kept, other), grandchildren, strict=True):
            os.kill(pid, signal.SIGKILL)
            each.kill()
            each.communicate()


def as_ray_does():
    """Set a handler as `ray.init` does at its beginning."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))


def starting_ray():
    with own_handlers_kept():
        as_ray_does()
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("went on")


def test_a_signal_that_met_another_handler_is_given_to_ours():
    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM$") as raised, stop_on_signals(at_once=True):
        starting_ray()
    assert raised.value.signal_number == signal.SIGTERM


def test_what_another_handler_cut_short_does_not_go_on_where_ours_only_asks():
    with stop_on_signals() as stop, pytest.raises(SystemExit) as raised:
        starting_ray()
    assert stop.signal_number == signal.SIGTERM
    assert raised.value.code == 143


def test_after_a_block_with_handlers_of_its_own_ours_are_back():
    with stop_on_signals() as stop:
        with own_handlers_kept():
            as_ray_does()
        signal.raise_signal(signal.SIGTERM)
        assert stop()
    with pytest.raises(SystemExit, match=r"^3$"), own_handlers_kept():
        sys.exit(3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_while_ray_starts_says_so_and_leaves_no_half_of_ray(
    tmp_path, monkeypatch, number, code
):
    done = []

    def init(**options):
        as_ray_does()
        os.kill(os.getpid(), number)
        pytest.fail("went on")

    monkeypatch.setenv("ML2O_HOME", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("shutdown"))
    monkeypatch.setattr("ml2o_dist.cli.command.exit_on_signals", done.append)
    before = handlers()
    result = CliRunner().invoke(main, ["meta-train", "--config", str(CONFIG), "--run-dir", "x", "--address", "local"])
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1
    assert says(result.stderr, f"ml2o: stopped by {number.name}", "no checkpoint")
    assert done == ["shutdown", code]
    assert handlers() == before


def test_a_signal_at_the_very_end_leaves_the_exit_code():
    script = (
        "import signal; from ml2o_dist.runtime.stopping import exit_on_signals; "
        "exit_on_signals(143); signal.raise_signal(2)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (143, "")
