"""The data set of recorded trajectories: bounded, whole through stops, and plain Parquet for everybody."""

from __future__ import annotations

import logging
import math
import re
import shutil
from dataclasses import replace

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from ml2o_dist.metatrain import trajectories
from ml2o_dist.metatrain.episode import run_episode
from ml2o_dist.metatrain.schedule import training_items
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.metatrain.trajectories import (
    SCHEMA,
    TrajectoryWriter,
    episodes_table,
    read_trajectories,
    recorded_problems,
)
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from ml2o_dist.runtime.errors import UserError
from tests.metatrain.executing import Cut, cut_after, digests, in_process, later
from tests.metatrain.settings import small
from tests.wording import says

SETTINGS = {"instances": 2, "trajectories": {"meta_steps": 4, "slots": 3}}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    trainer = Trainer(small(**SETTINGS), tmp_path_factory.mktemp("recorded"))
    trainer.run(later(in_process))
    return trainer


def files(run_dir):
    return {path.name: path.read_bytes() for path in (run_dir / "trajectories").iterdir()}


def expected_rows(settings):
    """Every row from the pure functions alone: run the scheduled episodes again under the untrained weights."""
    items = [item for item in training_items(settings, 0, "cpu") if item.spec.record]
    weights = ML2ONetwork(settings.rule).state_dict()
    return [(item, run_episode(weights, item.spec).trajectory) for item in items]


def test_rows_are_the_recorded_episodes(recorded):
    table = read_trajectories(recorded.run_dir).rows
    assert table.schema.equals(SCHEMA, check_metadata=True)
    rows = table.to_pylist()
    keys = [(row["meta_step"], row["slot"], row["instance"], row["step"]) for row in rows]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)
    assert {(row["meta_step"], row["slot"]) for row in rows} == {(t, s) for t in (1, 4, 8, 12) for s in range(3)}
    of_first = [row for row in rows if row["meta_step"] == 1]
    first = iter(of_first)
    for item, trajectory in expected_rows(recorded.settings):
        for instance in range(2):
            for step in range(item.spec.horizon):
                row = next(first)
                assert (row["slot"], row["instance"], row["step"]) == (item.key.slot, instance, step)
                assert (row["problem"], row["seed"]) == (str(item.spec.problem), item.spec.seed)
                assert row["losses"] == trajectory.losses[step, instance].tolist()
                assert row["gradient_norms"] == trajectory.gradient_norms[step, instance].tolist()
                assert row["gradient_cosines"] == trajectory.gradient_cosines[step, instance].tolist()
                assert row["update_norm"] == trajectory.update_norms[step, instance]
                assert row["descent_cosine"] == trajectory.descent_cosines[step, instance]
    assert next(first, None) is None


def test_every_column_says_what_it_holds():
    assert all(len(field.metadata[b"description"]) > 20 and not field.nullable for field in SCHEMA)
    assert b"description" in SCHEMA.metadata


def test_meta_steps_have_one_number_everywhere(tmp_path, caplog):
    """In metrics.parquet, in trajectories, in the names of their files and of checkpoints, in warnings: from 1."""

    def spoiled(items, weights):
        results = in_process(items, weights)
        lost = (items[0].key.purpose, items[0].key.meta_step) == ("train", 1)  # updates before it: the second meta-step
        return [replace(r, gradient=None, finite=False) if lost and i == 2 else r for i, r in enumerate(results)]

    trainer = Trainer(small(meta_steps=3, checkpoint_every=1, trajectories={"meta_steps": 3}), tmp_path)
    trainer.run(later(spoiled))
    figures = pq.read_table(tmp_path / "metrics.parquet").to_pylist()
    horizons = {row["meta_step"]: row["horizon"] for row in figures if row["horizon"] is not None}
    assert sorted(horizons) == [1, 2, 3]
    recorded = read_trajectories(tmp_path).rows.to_pylist()
    assert {row["meta_step"]: row["step"] + 1 for row in recorded} == horizons, "rows end with the last step"
    assert [path.name for path in sorted((tmp_path / "trajectories").iterdir())] == [
        f"step_{number:06d}.parquet" for number in horizons
    ]
    assert max(path.name for path in (tmp_path / "checkpoints").iterdir()) == "step_000003"
    assert [row["meta_step"] for row in figures if row["skipped_episodes"]] == [2]
    assert says(caplog.text, "meta-step 2", "1 of 4 episodes skipped")
    items = training_items(trainer.settings, 1, "cpu")
    assert str(items[2].key) == "meta-step 2 slot 2"
    assert {row["seed"] for row in recorded if (row["meta_step"], row["slot"]) == (2, 2)} == {items[2].spec.seed}


def test_the_size_is_bounded_by_the_settings(recorded, tmp_path):
    """20 meta-steps x 8 slots x P x K by default, whatever meta_steps and slots of the run are; 0 records nothing."""
    settings = small(slots=12, meta_steps=1000)
    kept = [t for t in range(1000) if any(item.spec.record for item in training_items(settings, t, "cpu"))]
    assert len(kept) == 20
    assert (kept[0], kept[-1]) == (0, 999)
    assert set(np.diff(kept)) <= {52, 53}
    assert sum(item.spec.record for item in training_items(settings, 0, "cpu")) == 8
    assert len(read_trajectories(recorded.run_dir).rows) <= 4 * 3 * 2 * 8
    none = Trainer(small(meta_steps=2, trajectories={"meta_steps": 0}), tmp_path)
    none.run(later(in_process))
    assert not (tmp_path / "trajectories").exists()


@pytest.mark.long
def test_an_inner_step_takes_some_thirty_bytes():
    """m = 2, K = 200, six slots: the embedded default's longest meta-step."""
    settings = small(horizon=200, slots=6, family={"train": [{"problem": "quadratic[n=5,noise=0.1]"}]})
    table = episodes_table(expected_rows(settings))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=["problem"])
    assert len(table) == 1200
    assert 15 < sink.getvalue().size / len(table) < 40


def test_recording_changes_no_weight(recorded, tmp_path):
    without = Trainer(small(instances=2, trajectories={"meta_steps": 0}), tmp_path)
    without.run(later(in_process))
    assert digests(without) == digests(recorded)


@pytest.mark.long
@pytest.mark.parametrize("calls", [0, 1, 3, 6, 9, 14])
def test_cut_anywhere_and_resumed_leaves_the_same_files(recorded, tmp_path, calls):
    """Killed without a last checkpoint: what was recorded since is recorded again, what was before is there."""
    settings = small(**SETTINGS, checkpoint_every=2)
    first = Trainer(settings, tmp_path)
    with pytest.raises(Cut):
        first.run(later(cut_after(calls)))
    first._trajectories.flush()  # that thread may have got any far: here, all the way
    try:
        second = Trainer(settings, tmp_path)
        second.resume()
    except UserError:  # no checkpoint yet: from the start
        second = Trainer(settings, tmp_path)
    second.run(later(in_process))
    assert files(tmp_path) == files(recorded.run_dir)


def test_a_checkpoint_is_not_written_before_what_was_recorded(tmp_path, monkeypatch):
    """Else a process that died between the two would lose it: a resumed run does not do those steps again."""
    seen = []
    real = trajectories.pq.write_table

    def slow(table, stream, **options):
        assert not list((tmp_path / "checkpoints").glob("step_000003"))
        seen.append(table["meta_step"][0].as_py())
        real(table, stream, **options)

    monkeypatch.setattr("ml2o_dist.metatrain.trajectories.pq.write_table", slow)
    settings = small(meta_steps=3, checkpoint_every=3, trajectories={"meta_steps": 3})
    trainer = Trainer(settings, tmp_path)
    monkeypatch.setattr("ml2o_dist.metatrain.trainer.write_history", lambda *arguments: seen.append("metrics"))
    trainer.run(later(in_process))
    assert seen == ["metrics", 1, 2, 3, "metrics"], "the first ones are written before anything is computed"


def test_a_run_begun_anew_keeps_nothing_of_one_that_was_killed_before_its_first_checkpoint(recorded, tmp_path):
    (tmp_path / "trajectories").mkdir()
    (tmp_path / "trajectories" / "step_000002.parquet").write_bytes(b"another run's")
    (tmp_path / "trajectories" / "notes.txt").write_text("the user's own")
    trainer = Trainer(small(**SETTINGS), tmp_path)
    trainer.run(later(in_process))
    assert (tmp_path / "trajectories" / "notes.txt").exists()
    assert {k: v for k, v in files(tmp_path).items() if k != "notes.txt"} == files(recorded.run_dir)


def test_a_full_disk_is_said_once_and_costs_only_the_trajectories(recorded, tmp_path, monkeypatch, caplog):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ml2o_dist.metatrain.trajectories.replacing", full)
    trainer = Trainer(small(**SETTINGS), tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.run(later(in_process))
    assert digests(trainer) == digests(recorded)
    said = [record.message for record in caplog.records if "trajectories" in record.message]
    assert len(said) == 1
    assert says(said[0], "meta-step 1", "cannot be written", "No space left on device", "goes on")
    assert not (tmp_path / "trajectories").exists()


def test_a_folder_that_cannot_be_made_is_said_too(tmp_path, caplog):
    (tmp_path / "trajectories").write_text("a file")
    settings = small(meta_steps=1)
    items = training_items(settings, 0, "cpu")
    writer = TrajectoryWriter(tmp_path)
    writer.add(0, items, in_process(items, ML2ONetwork(settings.rule).state_dict()))
    writer.flush()
    assert "cannot be written: " in caplog.text


def test_one_problem_s_rows_and_the_summary(recorded):
    everything = read_trajectories(recorded.run_dir).rows
    summaries = recorded_problems(everything)
    assert sum(each.inner_steps for each in summaries) == len(everything)
    assert sum(each.episodes for each in summaries) == 12
    one = next(each for each in summaries if each.objectives == 3)
    rows = read_trajectories(recorded.run_dir, one.problem).rows
    assert set(rows["problem"].to_pylist()) == {one.problem}
    assert len(rows) == one.inner_steps
    assert set(rows["meta_step"].to_pylist()) == set(one.meta_steps)
    name, inside = re.fullmatch(r"(\w+)\[(.*)\]", one.problem).groups()
    turned = f"{name}[{','.join(reversed(inside.split(',')))}]"
    assert read_trajectories(recorded.run_dir, turned).rows.equals(rows)


def test_what_is_not_there_is_said_in_one_line(recorded, tmp_path):
    with pytest.raises(UserError, match=r"no trajectories in .*trajectories"):
        read_trajectories(tmp_path)
    with pytest.raises(UserError, match=r"problem 'fonsecca'.*nearest of \d+ .*'fonseca'"):
        read_trajectories(recorded.run_dir, "fonsecca")
    empty = tmp_path / "trajectories"
    empty.mkdir()
    with pytest.raises(UserError, match="no trajectories in"):
        read_trajectories(tmp_path)


def cut(content):
    return content[:-100]


def flipped(content):
    """The footer's length, and so all of its words, cannot be found."""
    return content[:-8] + bytes([content[-8] ^ 0xFF]) + content[-7:]


def foreign(content):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"step": [1]}), sink)
    return sink.getvalue().to_pybytes()


def of_before(content):
    table = pq.read_table(pa.BufferReader(content))
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"format": "1"}), sink)
    return sink.getvalue().to_pybytes()


DAMAGE = [
    (cut, "cannot be read: "),
    (flipped, "cannot be read: "),
    (lambda content: b"", "cannot be read: "),
    (foreign, "cannot be read ... columns"),
    (of_before, "cannot be read ... format is 1 ... 2"),
]


@pytest.mark.parametrize(("damage", "why"), DAMAGE)
def test_a_file_that_cannot_be_read_is_named_and_the_others_are_used(recorded, tmp_path, damage, why):
    whole = read_trajectories(recorded.run_dir)
    assert whole.unread == ()
    shutil.copytree(recorded.run_dir / "trajectories", tmp_path / "trajectories")
    damaged = tmp_path / "trajectories" / "step_000004.parquet"
    damaged.write_bytes(damage(damaged.read_bytes()))
    rest = read_trajectories(tmp_path)
    assert rest.rows.equals(whole.rows.filter(pc.not_equal(whole.rows["meta_step"], 4)))
    (line,) = rest.unread
    assert line.startswith(f"{damaged} ")
    assert says(line, why)
    assert len(line.splitlines()) == 1
    for file in (tmp_path / "trajectories").iterdir():
        if file != damaged:
            file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"step_000001\.parquet cannot be read.*other 3 files"):
        read_trajectories(tmp_path)


def test_pandas_reads_the_folder(recorded):
    frame = pd.read_parquet(recorded.run_dir / "trajectories")
    ours = read_trajectories(recorded.run_dir).rows
    assert len(frame) == len(ours)
    assert list(frame.columns) == SCHEMA.names
    assert sorted(set(frame["problem"])) == sorted(set(ours["problem"].to_pylist()))
    assert frame["losses"].map(sum).sum() == pytest.approx(sum(map(sum, ours["losses"].to_pylist())), rel=1e-5)


def test_duckdb_reads_the_files(recorded):
    source = f"'{recorded.run_dir}/trajectories/*.parquet'"
    ours = read_trajectories(recorded.run_dir).rows
    counted = duckdb.sql(f"SELECT problem, count(*), max(len(losses)) FROM {source} GROUP BY problem ORDER BY 1")
    assert counted.fetchall() == [(r.problem, r.inner_steps, r.objectives) for r in recorded_problems(ours)]
    # the question one records for: how far does the first objective fall, early and late?
    fallen = duckdb.sql(f"""
        SELECT meta_step, avg(losses[1]) FILTER (step = 0), avg(losses[1]) FILTER (step = 4)
        FROM {source} GROUP BY meta_step ORDER BY meta_step""").fetchall()
    assert [row[0] for row in fallen] == [1, 4, 8, 12]
    first = [r["losses"][0] for r in ours.to_pylist() if r["meta_step"] == 1 and r["step"] == 0]
    assert fallen[0][1] == pytest.approx(np.mean(first), rel=1e-5)


@pytest.mark.long
def test_ray_data_reads_the_folder(cluster, recorded):
    import ray

    data = ray.data.read_parquet(str(recorded.run_dir / "trajectories"))
    rows = sorted(data.take_all(), key=lambda r: (r["meta_step"], r["slot"], r["instance"], r["step"]))
    ours = read_trajectories(recorded.run_dir).rows.to_pylist()
    assert [{**r, **{k: list(r[k]) for k in ("losses", "gradient_norms", "gradient_cosines")}} for r in rows] == ours


def test_not_a_number_stays_not_a_number(tmp_path):
    """An episode that blew up, through the file and back."""
    settings = small(meta_steps=1, slots=1, horizon=12, family={"train": [{"problem": "quadratic[n=4,noise=0.1]"}]})
    weights = {n: t.new_full(t.shape, 50.0) for n, t in ML2ONetwork(settings.rule).state_dict().items()}
    items = training_items(settings, 0, "cpu")
    writer = TrajectoryWriter(tmp_path)
    writer.add(0, items, in_process(items, weights))
    writer.flush()
    (last,) = read_trajectories(tmp_path).rows.slice(11).to_pylist()
    assert not all(map(math.isfinite, last["losses"]))
    assert math.isnan(last["descent_cosine"])
