"""metrics.parquet: whole numbers are whole, every figure has its described column, and others' files are named."""

from __future__ import annotations

import math
import os
import time

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.metatrain.history import FILE, SCHEMA, History, read_history, write_history
from ml2o_dist.metatrain.schedule import horizon
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.runtime import reading_tables
from ml2o_dist.runtime.errors import UserError
from tests.metatrain.executing import in_process, later
from tests.metatrain.settings import small


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trainer = Trainer(small(), tmp_path_factory.mktemp("trained"))
    trainer.run(later(in_process))
    return trainer


def test_counts_and_numbers_of_meta_steps_are_integers(trained):
    schema = pq.read_schema(trained.run_dir / FILE)
    whole = {field.name for field in schema if field.type == pa.int64()}
    assert whole == {"meta_step", "horizon", "lag", "skipped_episodes", "failed_episodes", "result_bytes"}
    assert {field.type for field in schema if field.name not in whole} == {pa.float64()}
    rows = duckdb.sql(f"SELECT meta_step, horizon, skipped_episodes FROM '{trained.run_dir / FILE}'").fetchall()
    drawn = [horizon(trained.settings, step) for step in range(12)]
    assert rows == [(0, None, None), *((step + 1, drawn[step], 0) for step in range(12))]
    assert {type(x) for row in rows[1:] for x in row} == {int}


def test_every_figure_of_a_run_has_a_column_that_says_what_it_holds(trained):
    assert {name for row in trained.progress.history for name in row} == set(SCHEMA.names)
    written = pq.read_schema(trained.run_dir / FILE)
    assert written.equals(SCHEMA, check_metadata=True)
    assert all(len(field.metadata[b"description"]) > 20 for field in written)


def test_what_is_read_is_what_the_run_knows(trained):
    rows = [{name: x for name, x in row.items() if x is not None} for row in read_history(trained.run_dir / FILE)]
    assert rows == list(trained.progress.history)


def test_a_checkpoint_keeps_its_history_in_float64(trained):
    checkpoint, _ = newest_checkpoint(trained.run_dir / "checkpoints")
    columns = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("history/")}
    assert {tensor.dtype for tensor in columns.values()} == {torch.float64}
    assert columns["history/meta_step"].tolist() == list(range(13))


def test_an_infinite_validation_and_no_row_at_all_are_written(tmp_path):
    history = History()
    history.add(0, {"validation": math.inf})
    write_history(tmp_path, history)
    assert read_history(tmp_path / FILE)[0]["validation"] == math.inf
    write_history(tmp_path, History())
    assert read_history(tmp_path / FILE) == []
    assert pq.read_schema(tmp_path / FILE).names == SCHEMA.names


def test_a_file_of_before_with_float64_alone_is_read(tmp_path):
    pq.write_table(pa.table({"meta_step": [0.0, 1.0], "horizon": [None, 50.0], "other": ["a", "b"]}), tmp_path / FILE)
    first, second = read_history(tmp_path / FILE)
    assert (first["meta_step"], first["horizon"]) == (0, None)
    assert (second["meta_step"], second["horizon"], second["validation"]) == (1, 50, None)
    assert isinstance(second["meta_step"], int)


def test_a_file_of_something_else_is_named(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / FILE)
    with pytest.raises(UserError, match=r"metrics\.parquet cannot be read.*no column meta_step"):
        read_history(tmp_path / FILE)


def test_rows_keep_what_was_added_to_them_and_nothing_that_is_no_number():
    history = History()
    history.add(0, {"validation": 3.0})
    history.add(1, {"meta_loss": 2.0, "gradient_norm": math.nan})
    history.add(1, {"validation": math.inf})
    assert list(history) == [
        {"meta_step": 0, "validation": 3.0},
        {"meta_step": 1, "meta_loss": 2.0, "validation": math.inf},
    ]
    assert next(iter(reversed(history))) == history[-1] == history[1]
    assert list(History(history.columns)) == list(history)
    assert len(History()) == 0


def test_the_rows_say_where_the_time_of_a_run_went(tmp_path):
    worked, settings = [], small(meta_steps=4, workers=2)

    def execute(items, weights):
        results = in_process(items, weights)
        worked.append(sum(result.seconds for result in results))
        return results

    trainer = Trainer(settings, tmp_path)
    began = time.monotonic()
    trainer.run(later(execute))
    total = time.monotonic() - began
    rows = [row for row in trainer.progress.history if "seconds" in row]
    assert len(rows) == 4
    assert 0.5 * total < sum(row["seconds"] for row in rows) < total
    busy = sum(2 * row["worker_utilisation"] * row["seconds"] for row in rows)
    assert busy == pytest.approx(sum(worked[:-1]))  # the last validation is after the last row
    assert busy < sum((1 - row["learner_share"]) * row["seconds"] for row in rows) < total
    assert {row["result_bytes"] for row in rows} == {4 * 4 * sum(t.numel() for t in trainer.learner.weights.values())}


def test_a_file_that_claims_too_much_is_not_read(tmp_path, monkeypatch):
    """Equal values take no room in a file: a hundred million of them are a bomb of a few kilobytes."""
    monkeypatch.setattr(reading_tables, "VALUES_LIMIT", 100_000)
    pq.write_table(pa.table({"meta_step": np.zeros(100_001)}), tmp_path / FILE)
    assert (tmp_path / FILE).stat().st_size < 2000
    with pytest.raises(UserError, match=r"metrics\.parquet cannot be read.*100,001 values"):
        read_history(tmp_path / FILE)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"meta_step": ["a"]}, "meta_step.*string.*int64"),
        ({"meta_step": [None, 1]}, "row.*no meta_step"),
        ({"meta_step": [0.5]}, "truncated.*int64"),
        ({"meta_step": [1], "meta_loss": [[1.0]]}, "meta_loss.*list<element: double>.* double"),
    ],
)
def test_columns_of_other_kinds_are_named(table, why, tmp_path):
    pq.write_table(pa.table(table), tmp_path / FILE)
    with pytest.raises(UserError, match=why):
        read_history(tmp_path / FILE)


def test_what_is_no_regular_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(UserError, match=r"metrics\.parquet cannot be read.*regular file"):
        read_history(tmp_path / FILE)
