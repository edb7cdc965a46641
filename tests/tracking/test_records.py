"""Records as lines: they come back equal, and a line that was altered anywhere does not come back at all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml2o_dist.tracking.records import End, Params, Point, Record, Tags, Upload, Version, from_line, to_line

WORDS = st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=5)
RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.builds(Point, st.text(min_size=1), st.floats(allow_nan=False), st.integers(0, 2**62), st.integers(0, 2**62)),
    st.builds(Params, WORDS),
    st.builds(Tags, WORDS),
    st.builds(Upload, st.just(Path("files/0/a b.png")), st.sampled_from(["", "a", "é-_1/b"])),
    st.builds(Version, st.just(Path("..")), st.text(), st.text()),
    st.builds(End, st.sampled_from(["FINISHED", "FAILED", "KILLED"]), st.integers(0, 2**62)),
)


@given(RECORDS)
def test_a_record_comes_back_equal_from_one_line(record: Record) -> None:
    line = to_line(record)
    assert line.index(b"\n") == len(line) - 1
    assert from_line(line) == record


@pytest.mark.parametrize("folder", [".", "..", "/tmp", "a/../b", "a/", "a//b", ":", "a\n"])
def test_an_upload_into_a_folder_that_leads_elsewhere_is_none(folder: str) -> None:
    assert from_line(to_line(Upload(Path("a"), folder))) is None


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 5e-324, -0.0, 0.1 + 0.2])
def test_every_float_comes_back_bit_for_bit(value: float) -> None:
    back = from_line(to_line(Point("a", value, 0, 0)))
    assert isinstance(back, Point)
    assert repr(back.value) == repr(value)


def test_a_line_cut_anywhere_or_altered_anywhere_is_none() -> None:
    line = to_line(Point("meta_loss", 0.125, 17, 1764012345678))
    assert [from_line(line[:length]) for length in range(len(line))] == [None] * len(line)
    for place in range(len(line)):
        for bit in range(8):
            altered = bytearray(line)
            altered[place] ^= 1 << bit
            assert from_line(bytes(altered)) is None
