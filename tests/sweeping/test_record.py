"""The record of a sweep: lines of a file that survive a kill, and tables made of them."""

from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest

from ml2o_dist.sweeping.record import FILE, Report, SweepRecord, markdown, write_table


def report(step, score, values=None, best=None):
    return Report(step, score, score if best is None else best, step, 1.5 * step, values or {"lr": 0.1})


@pytest.fixture
def record(tmp_path):
    record = SweepRecord(tmp_path)
    for id, number, scores in (("a", 1, (3.0, 2.0)), ("b", 2, (3.0, 1.0)), ("c", 3, (3.0, math.inf))):
        record.begin(id, {"lr": number / 10})
        for i, score in enumerate(scores):
            record.report(id, report(2 * i, score, {"lr": number / 10}))
    record.end("a", "finished")
    record.end("b", "failed", "ValueError: no")
    record.end("c", "stopped")
    return record


def test_what_was_written_is_read_back(record, tmp_path):
    assert SweepRecord(tmp_path).trials == record.trials
    assert [trial.number for trial in SweepRecord(tmp_path).in_order] == [1, 2, 3]
    assert SweepRecord(tmp_path).trials["b"].error == "ValueError: no"


def test_a_line_that_a_kill_has_cut_is_left_out_and_the_next_one_is_whole(record, tmp_path):
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes() + b'{"trial": "a", "meta_st')
    again = SweepRecord(tmp_path)
    assert again.trials == record.trials
    again.report("a", report(4, 0.5))
    assert SweepRecord(tmp_path).trials["a"].reports[4].validation == 0.5
    assert SweepRecord(tmp_path).trials == again.trials


def test_a_report_that_comes_again_takes_the_place_of_the_first(record, tmp_path):
    record.report("a", report(2, 1.75))
    assert [each.validation for each in SweepRecord(tmp_path).trials["a"].reports.values()] == [3.0, 1.75]


def test_the_best_is_finite_and_did_not_fail_and_failed_ones_are_last(record):
    assert record.best().id == "a"
    assert [trial.id for trial in record.ranked()] == ["a", "c", "b"]


def test_the_score_is_that_of_the_weights_that_are_kept(record):
    record.report("a", report(4, 2.5, best=2.0))
    assert record.trials["a"].score == 2.0
    assert record.trials["a"].meta_steps == 4


def test_a_trial_that_is_tried_again_runs(record, tmp_path):
    record.begin("b", {"lr": 0.2})
    again = SweepRecord(tmp_path).trials["b"]
    assert (again.state, again.error, len(again.reports)) == ("running", "", 2)


def test_trials_that_are_forgotten_were_never_there(record, tmp_path):
    record.forget(["a", "c"])
    assert list(SweepRecord(tmp_path).trials) == list(record.trials) == ["b"]
    record.forget([])
    assert [record.begin(id, {}).number for id in ("d", "b", "e", "f")] == [1, 2, 3, 4]
    assert [trial.id for trial in SweepRecord(tmp_path).in_order] == ["d", "b", "e", "f"]


def test_json_has_null_for_what_is_not_finite(record):
    record.report("c", report(0, math.inf))
    answers = [trial.to_json() for trial in record.in_order]
    assert [answer["validation"] for answer in answers] == [2.0, 1.0, None]
    json.dumps(answers, allow_nan=False)
    assert answers[0]["seconds"] == 3.0


def test_tables_have_a_row_for_each_trial(record, tmp_path):
    rows = pq.read_table(write_table(tmp_path, record)).to_pylist()
    assert [(row["trial"], row["state"], row["lr"]) for row in rows] == [
        (1, "finished", 0.1), (2, "failed", 0.2), (3, "stopped", 0.3)
    ]  # fmt: skip
    lines = markdown(record, "x", "none").splitlines()
    assert lines[2] == "| trial | state | meta-steps | best at | validation | lr | folder |"
    assert lines[4] == "| 1 | finished | 2 | 2 | 2 | 0.1 | tune/a |"
    assert lines[5] == "| 3 | stopped | 2 | 2 | - | 0.3 | tune/c |"
    assert len(lines) == 7


def test_what_the_table_does_not_show_is_said(record):
    assert record.notes("asha") == []
    (schedule,) = record.notes("pbt")
    assert "schedule of values" in schedule
    record.report("a", Report(4, 2.5, 1.5, 0, 6.0, {"lr": 0.1}))  # its best weights are the first
    (untrained,) = record.notes("none")
    assert untrained.startswith("The best weights, of trial 1, are those of meta-step 0")
    assert markdown(record, "x", "pbt").endswith(f"\n\n{untrained}\n\n{schedule}\n")


def test_so_far_counts_trials_that_have_not_begun(record):
    assert record.so_far(5) == "3 of 5 trials ended, 0 under way, 2 not begun"
    record.begin("b", {"lr": 0.2})
    record.begin("d", {"lr": 0.2})
    assert record.so_far(5) == "2 of 5 trials ended, 2 under way, 1 not begun"


def test_values_of_mixed_kinds_are_json_in_the_table(tmp_path):
    record = SweepRecord(tmp_path)
    for number, value in enumerate((None, {"budget": 1}, [4, 8]), start=1):
        record.begin(str(number), {"rule.guard": value})
    rows = pq.read_table(write_table(tmp_path, record)).to_pylist()
    assert [json.loads(row["rule.guard"]) for row in rows] == [None, {"budget": 1}, [4, 8]]
