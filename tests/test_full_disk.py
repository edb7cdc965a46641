"""A run on a disk that is full or read-only: real small file systems, mounted by the test."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest

from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.rundir.directory import check_writable
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.workflows import evaluate as evaluations
from tests.evaluate_command import QUICK as EVALUATION
from tests.evaluate_command import ml2o as evaluate
from tests.meta_train_command import QUICK, ml2o
from tests.wording import says


@pytest.fixture
def disk(tmp_path):
    """A tmpfs of 2 MB, unmounted at the end; the test is skipped where it cannot be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs could be mounted (root needed): {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(disk):
    """Take every byte that is left."""
    with open(disk / "filler", "ab", buffering=0) as stream:
        for size in (65536, 4096, 1):
            try:
                while True:
                    stream.write(b"\0" * size)
            except OSError:
                continue


@contextmanager
def filled_before(calls, disk):
    """Fill the disk before these calls of the pool, from 1, and free it before all others."""
    real, count = WorkerPool.begin, [0]

    def begin(pool, items, weights):
        count[0] += 1
        (disk / "filler").unlink(missing_ok=True)
        if count[0] in calls:
            fill(disk)
        return real(pool, items, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerPool, "begin", begin)
        yield


def said(result):
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ml2o: ")]
    assert "Traceback" not in result.output
    assert "Logging error" not in result.output
    return line


@pytest.mark.long
def test_a_disk_that_is_full_for_a_while_costs_a_warning_and_at_the_end_the_run_is_resumed(cluster, home, disk):
    """Calls of the pool: validation 0, steps 1-3, validation 3, steps 4-6, validation 6; checkpoints at 2, 4, 6."""
    calm = json.loads(ml2o(*QUICK, "--run-dir", str(home / "calm"), "--json").stdout)
    with filled_before({3}, disk):
        result = ml2o(*QUICK, "--run-dir", str(disk / "a"), "--json")
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    assert "Logging error" not in result.output
    assert " ".join(result.stderr.split()).count("no checkpoint could be written") == 1
    assert json.loads(result.stdout)["weights_sha256"] == calm["weights_sha256"]

    with filled_before({8, 9}, disk):
        result = ml2o(*QUICK, "--run-dir", str(disk / "b"))
    assert result.exit_code == 4, result.output
    line = said(result)
    assert says(line, "no checkpoint", f"{disk}/b", "meta-step 6 of 6", "No space left on device")
    assert f"ml2o meta-train --run-dir {disk}/b --resume" in line
    found, refused = newest_checkpoint(disk / "b" / "checkpoints")
    assert (found.meta_step, refused) == (4, [])
    assert pq.read_table(disk / "b" / "metrics.parquet").num_rows == 5
    assert not list((disk / "b").glob("weights*"))
    (disk / "filler").unlink()
    again = ml2o("--run-dir", str(disk / "b"), "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["weights_sha256"] == calm["weights_sha256"]
    assert load_artifact(disk / "b").weights_sha256 == calm["weights_sha256"]


@pytest.mark.long
def test_a_full_disk_at_the_weights_is_exit_code_4_and_leaves_no_torn_file(cluster, home, disk, monkeypatch):
    from ml2o_dist import artifact

    real = artifact.save_artifact

    def save(*args):
        fill(disk)
        return real(*args)

    monkeypatch.setattr("ml2o_dist.artifact.save_artifact", save)
    result = ml2o(*QUICK, "--run-dir", str(disk / "a"))
    assert result.exit_code == 4, result.output
    line = said(result)
    assert says(line, f"{disk}/a/weights.safetensors'", "cannot be written", "No space left on device")
    assert "checkpoint at meta-step 6 of 6" in line
    assert not list((disk / "a").glob("*weights*"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "file"),
    [
        ("ml2o_dist.workflows.meta_train_end.write_report", "report.html"),
        ("ml2o_dist.workflows.meta_train_end._register", "result.json"),
    ],
)
def test_a_full_disk_at_the_page_or_the_answer_is_no_success_and_resuming_completes_it(
    cluster, home, disk, monkeypatch, before, file
):
    module, name = before.rsplit(".", 1)
    real = getattr(importlib.import_module(module), name)

    def at_last(*args, **options):
        fill(disk)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(before, at_last)
        result = ml2o(*QUICK, "--run-dir", str(disk / "a"), "--json")
    assert result.exit_code == 3, result.output
    assert says(said(result), f"{disk}/a/{file}", "cannot be written", "No space left on device")
    assert load_artifact(disk / "a").weights_sha256 == json.loads(result.stdout)["weights_sha256"]
    (disk / "filler").unlink()
    again = ml2o("--run-dir", str(disk / "a"), "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert (disk / "a" / file).stat().st_size > 0


@pytest.mark.long
def test_a_full_disk_at_the_results_of_an_evaluation_is_no_success(cluster, home, disk, monkeypatch):
    real = evaluations.evaluation_markdown

    def at_last(evaluation):
        fill(disk)
        return real(evaluation)

    with monkeypatch.context() as patch:
        patch.setattr(evaluations, "evaluation_markdown", at_last)
        result = evaluate(*EVALUATION, "--run-dir", str(disk / "a"), "--json")
    assert result.exit_code == 3, result.output
    assert says(said(result), "ml2o: ", "cannot be written", f"{disk}/a", "No space left on device", "same command")
    assert json.loads(result.stdout)["summary"]["run_dir"] == str(disk / "a")
    (disk / "filler").unlink()
    again = evaluate(*EVALUATION, "--run-dir", str(disk / "a"), "--json")
    assert again.exit_code == 0, again.output
    assert (disk / "a" / "evaluation.json").stat().st_size > 0


def test_a_read_only_run_directory_is_one_line_before_ray_is_started(home, disk, monkeypatch):
    monkeypatch.setattr("ml2o_dist.workflows.meta_train.connected", lambda address: pytest.fail("Ray was asked for"))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for place in (disk, disk / "runs" / "a"):
        result = ml2o(*QUICK, "--run-dir", str(place))
        assert result.exit_code == 2, result.output
        assert says(said(result), "ml2o: ", f"'{place}'", "cannot be written", "Read-only file system")


def test_a_run_directory_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/runs' cannot be written.*Not a directory"):
        check_writable(tmp_path / "file" / "runs")
    check_writable(tmp_path / "new" / "runs")
    assert os.listdir(tmp_path) == ["file"]
