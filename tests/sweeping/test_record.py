"""The record of a sweep: lines of a file that survive a kill, and tables made of them."""

from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.sweeping.record import FILE, SweepRecord, markdown, write_table
from ml2o_dist.sweeping.record_lines import Report
from tests.wording import says


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


def test_values_of_an_older_version_have_the_present_keys(tmp_path):
    lines = (
        {"trial": "a", "number": 1, "values": {"slots": 4}},
        {"trial": "b", "number": 2, "values": {"rule.count": 3}},
    )
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {id: trial.values for id, trial in SweepRecord(tmp_path).trials.items()}
    assert values == {"a": {"meta_batch_size": 4}, "b": {"rule.num_objectives": 3}}


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


def test_a_trial_that_is_brought_back_says_again_what_it_said_after(record, tmp_path):
    record.report("a", report(4, 0.5, {"lr": 0.7}))
    record.copy("a", "b", 4, {"lr": 0.9})
    assert SweepRecord(tmp_path).trials["a"].copied.source == "b"
    record.rewind("a", 2)
    again = SweepRecord(tmp_path)
    assert again.trials == record.trials
    assert (sorted(again.trials["a"].reports), again.trials["a"].copied) == ([0, 2], None)
    assert again.trials["a"].values == {"lr": 0.1}
    assert list(again.in_time) == list(record.in_time) == [(id, step) for id in "abc" for step in (0, 2)]


def test_a_trial_that_was_given_weights_goes_on_from_them_until_it_reports(record, tmp_path):
    record.copy("a", "b", 2, {"lr": 0.9})
    record.rewind("a", 2)
    record.begin("a", {"lr": 0.9})
    trial = SweepRecord(tmp_path).trials["a"]
    assert (trial.copied.source, trial.copied.at, trial.values) == ("b", 2, {"lr": 0.9})
    record.report("a", report(4, 1.0, {"lr": 0.9}))
    assert SweepRecord(tmp_path).trials["a"].copied is None


def test_the_report_that_brings_an_exchange_about_comes_after_the_copies_and_takes_none_back(record, tmp_path):
    record.begin("a", {"lr": 0.1})
    record.copy("a", "b", 4, {"lr": 0.9})
    record.report("a", report(4, 1.0, record.trials["a"].runs_with))
    trial = SweepRecord(tmp_path).trials["a"]
    assert trial == record.trials["a"]
    assert (trial.reports[4].values, trial.values, trial.copied.source) == ({"lr": 0.1}, {"lr": 0.9}, "b")
    record.begin("a", {"lr": 0.9})
    record.report("a", report(6, 0.5, record.trials["a"].runs_with))
    trial = SweepRecord(tmp_path).trials["a"]
    assert (trial.reports[6].values, trial.values, trial.copied) == ({"lr": 0.9}, {"lr": 0.9}, None)


def test_no_meta_step_stands_twice_in_the_file(record, tmp_path):
    record.report("a", report(2, 1.75))
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["meta_step"] for line in lines if line["trial"] == "a" and "meta_step" in line] == [0, 2]


GOOD = {"trial": "a", "meta_step": 4, "validation": 1.0, "best_validation": 1.0, "best_meta_step": 4, "seconds": 1.0,
        "values": {"lr": 0.1}, "meta_loss": None}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"[" * 100_000, "nested deeper than"),
        (b"\x00\xff", "not JSON"),
        (b"[1, 2]", "not a JSON object but list"),
        (b'{"trial": "a", "state": 1' + b"0" * 5000 + b', "error": ""}', "an integer of"),
        (b'{"x": "' + b"y" * 300_000 + b'"}', "larger than"),
        ({"trial": "zzz", "state": "failed", "error": ""}, "no trial 'zzz'"),
        ({"trial": "../../etc", "number": 9, "values": {}}, "trial must be letters"),
        ({"trial": "d", "number": 1, "values": {}}, "number 1 ... 'a'"),
        ({"trial": "d", "number": True, "values": {}}, "number ... whole number from 1 ... true"),
        ({"trial": "d", "number": 9, "values": {"lr": math.nan}}, "values ... finite"),
        ({"trial": ["a"], "number": 9, "values": {}}, "trial must be letters"),
        ({"trial": "a", "state": "gone", "error": ""}, "state ... running | finished | stopped | failed"),
        ({"trial": "a", "state": ["failed"], "error": ""}, "state must be"),
        ({"trial": "a", "state": "failed"}, "it has no 'error'"),
        ({"trial": "a", "source": "zzz", "at": 2, "values": {}}, "no trial 'zzz'"),
        (GOOD | {"more": 1}, "key 'more'"),
        (GOOD | {"meta_step": -1}, "meta_step ... whole number from 0 ... -1"),
        (GOOD | {"meta_step": 2.5}, "meta_step ... whole number"),
        (GOOD | {"seconds": math.inf}, "seconds ... finite"),
        (GOOD | {"validation": "low"}, 'validation ... number ... "low"'),
        (GOOD | {"values": 3}, "values must be an object"),
    ],
)
def test_a_line_that_is_none_of_ours_is_left_out_with_a_word(record, tmp_path, line, why):
    text = line if isinstance(line, bytes) else json.dumps(line).encode()
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes() + text + b"\n")
    again = SweepRecord(tmp_path)
    assert again.trials == record.trials
    (note,) = again.notes("none")
    assert says(note, FILE, "1 line", "left out", "line 13")
    assert says(note, why)
    assert "\n" not in note


def test_what_is_no_file_of_ours_is_one_line(tmp_path):
    (tmp_path / "theirs").write_text("theirs\n")
    for target in ("/dev/zero", tmp_path / "theirs", tmp_path / "not there"):
        (tmp_path / FILE).unlink(missing_ok=True)
        (tmp_path / FILE).symlink_to(target)
        with pytest.raises(UserError, match=r"link.*regular file"):
            SweepRecord(tmp_path)
    assert (tmp_path / "theirs").read_text() == "theirs\n"


def test_a_trial_without_any_checkpoint_begins_with_the_values_that_it_began_with(record, tmp_path):
    record.copy("a", "b", 4, {"lr": 0.9})
    record.report("a", report(6, 1.0, {"lr": 0.9}))
    record.rewind("a", -1)
    assert record.trials["a"].values == {"lr": 0.1}
    assert SweepRecord(tmp_path).trials["a"].values == {"lr": 0.1}


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
    assert says(untrained, "best weights", "trial 1", "meta-step 0")
    assert markdown(record, "x", "pbt").endswith(f"\n\n{untrained}\n\n{schedule}\n")


def test_so_far_counts_trials_that_have_not_begun(record):
    assert says(record.so_far(5), "3 of 5", "ended", "0 under way", "2 not begun")
    record.begin("b", {"lr": 0.2})
    record.begin("d", {"lr": 0.2})
    assert says(record.so_far(5), "2 of 5", "ended", "2 under way", "1 not begun")


def test_values_of_mixed_kinds_are_json_in_the_table(tmp_path):
    record = SweepRecord(tmp_path)
    for number, value in enumerate((None, {"budget": 1}, [4, 8]), start=1):
        record.begin(str(number), {"rule.guard": value})
    rows = pq.read_table(write_table(tmp_path, record)).to_pylist()
    assert [json.loads(row["rule.guard"]) for row in rows] == [None, {"budget": 1}, [4, 8]]
