"""The spool: whatever is cut, killed or full, what is read back was written whole, in order, and until it was sent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from itertools import count
from pathlib import Path

import pytest

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking import spool as spool_module
from ml2o_dist.tracking.records import End, Params, Point, Record, Tags, Upload, Version, to_line
from ml2o_dist.tracking.spool import Spool, unsent_values
from tests.wording import says


def points(*steps: int) -> list[Point]:
    return [Point("a", step / 3, step, 1000 + step) for step in steps]


def drained(spool: Spool, limit: int = 1000) -> list[Record]:
    """Read and acknowledge everything."""
    records: list[Record] = []
    while (batch := spool.read(limit)).records:
        records += batch.records
        spool.advance(batch)
    return records


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "spool"


def test_records_come_back_in_order_until_they_are_sent_also_after_a_restart(folder: Path) -> None:
    records = [Params({"seed": "1"}), *points(0, 1, 2), Tags({"git": "abc"}), *points(3)]
    spool = Spool(folder)
    spool.append(records[:3])
    spool.append(records[3:])
    assert (spool.unsent, spool.unsent_values) == (6, 4)
    assert spool.read(1000) == spool.read(1000)
    sizes = []
    while (batch := spool.read(2)).records:
        sizes.append(len(batch.records))
        spool.advance(batch)
        spool.close()
        spool = Spool(folder)  # a restart after each call
    assert sizes == [1, 2, 1, 1, 1]
    assert (spool.unsent, spool.unsent_values) == (0, 0)
    spool.rewind()
    assert drained(spool) == records


def test_what_was_sent_but_not_noted_is_read_again(folder: Path) -> None:
    spool = Spool(folder)
    spool.append(points(0, 1, 2, 3))
    spool.advance(spool.read(2))
    unnoted = spool.read(2)
    spool.close()  # killed before `advance`
    assert Spool(folder).read(2) == unnoted
    assert list(unnoted.records) == points(2, 3)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"bytes": null}', '{"bytes": 10000000}'])
def test_a_note_that_makes_no_sense_loses_nothing(folder: Path, content: str) -> None:
    spool = Spool(folder)
    spool.append(points(0, 1))
    spool.close()
    (folder / "sent.json").write_text(content)
    spool = Spool(folder)
    spool.append(points(2))
    spool.close()
    assert drained(Spool(folder)) == points(0, 1, 2)


def test_cut_at_any_byte_the_whole_lines_stay_and_the_torn_one_goes(folder: Path, tmp_path: Path) -> None:
    records = [*points(0, 1), Params({"seed": "1"}), *points(2)]
    spool = Spool(folder)
    spool.append(records)
    spool.close()
    content = (folder / "records.jsonl").read_bytes()
    ends = [sum(len(to_line(record)) for record in records[:count]) for count in range(len(records) + 1)]
    assert ends[-1] == len(content)
    for length in range(len(content) + 1):
        cut = tmp_path / str(length)
        cut.mkdir()
        (cut / "records.jsonl").write_bytes(content[:length])
        whole = sum(end <= length for end in ends[1:])
        spool = Spool(cut)
        assert spool.unsent == whole
        spool.append(points(9))
        spool.close()
        assert (cut / "records.jsonl").read_bytes() == content[: ends[whole]] + to_line(points(9)[0])
        assert drained(Spool(cut)) == [*records[:whole], *points(9)]


def test_an_altered_byte_costs_its_own_line_only(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(folder)
    spool.append(points(0, 1, 2))
    spool.close()
    content = bytearray((folder / "records.jsonl").read_bytes())
    first = len(to_line(points(0)[0]))
    for place in range(first, first + len(to_line(points(1)[0])) - 1):
        altered = tmp_path / str(place)
        altered.mkdir()
        (altered / "records.jsonl").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        spool = Spool(altered)
        assert spool.unsent == 2
        assert drained(spool) == points(0, 2)
    assert says(caplog.text, "1 damaged lines", "left out")


def test_a_full_disk_leaves_nothing_of_what_did_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(folder)
    spool.append(points(0))
    real = os.pwrite
    room = len(to_line(points(1)[0])) + 7  # a line and a bit more

    def pwrite(file: int, content: bytes, position: int) -> int:
        nonlocal room
        if room == 0:
            raise OSError(28, "No space left on device")
        written = real(file, bytes(content)[:room], position)
        room -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="No space left"):
            spool.append(points(1, 2, 3))
    assert spool.unsent == 1
    assert (folder / "records.jsonl").read_bytes() == to_line(points(0)[0])
    spool.append(points(4))
    assert drained(spool) == points(0, 4)


def test_a_file_is_sent_as_it_was_and_from_wherever_the_run_was_moved_to(folder: Path, tmp_path: Path) -> None:
    picture = folder.parent / "plots" / "curve.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"first")
    spool = Spool(folder)
    spool.append([*points(0), Upload(picture, "plots")])
    picture.write_bytes(b"second")
    spool.append([Upload(picture, "plots"), Upload(tmp_path / "gone.png", ""), Version(folder.parent, "ml2o", "text")])
    picture.unlink()
    spool.close()
    shutil.move(folder.parent, tmp_path / "moved")
    found = drained(Spool(tmp_path / "moved" / "spool"))
    uploads = [record for record in found if isinstance(record, Upload)]
    assert [upload.path.name for upload in uploads] == ["curve.png", "curve.png", "gone.png"]
    assert [upload.path.read_bytes() for upload in uploads[:2]] == [b"first", b"second"]
    assert not uploads[2].path.exists()
    assert found[-1] == Version(tmp_path / "moved", "ml2o", "text")


def test_an_end_counts_only_where_nothing_follows(folder: Path) -> None:
    spool = Spool(folder)
    spool.append([*points(0), End("KILLED", 1)])
    assert drained(spool) == [*points(0), End("KILLED", 1)]
    spool.append([*points(1), End("FINISHED", 2)])
    spool.rewind()
    assert spool.unsent == 4
    assert drained(spool) == [*points(0), *points(1), End("FINISHED", 2)]
    assert spool.unsent == 0


def test_one_process_at_a_time_and_a_killed_one_lets_go(folder: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from ml2o_dist.tracking.spool import Spool\n"
        "from ml2o_dist.tracking.records import Point\n"
        "spool = Spool(Path(sys.argv[1])); spool.append([Point('a', 1.0, 0, 0)]); print('open', flush=True)\n"
        "time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=r"in use"):
            Spool(folder)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=60)
    assert unsent_values(folder) == 1
    assert drained(Spool(folder)) == [Point("a", 1.0, 0, 0)]


def test_a_removed_spool_is_gone_and_a_new_one_knows_nothing_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(folder)
    spool.append(points(0, 1, 2))
    drained(spool)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *words, **options: None)  # killed after the rename
        spool.remove()
    assert spool.removed
    assert not folder.exists()
    assert list(folder.parent.iterdir()) != []
    assert unsent_values(folder) == 0
    again = Spool(folder)
    again.append(points(7))
    assert drained(again) == points(7)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_closed_spool_takes_no_notes(folder: Path) -> None:
    """A thread that was left behind by `close` must not disturb the process that has the spool now."""
    spool = Spool(folder)
    spool.append(points(0, 1))
    batch = spool.read(1)
    spool.close()
    other = Spool(folder)
    spool.advance(batch)
    spool.remove()
    assert spool.read(1).records == []
    with pytest.raises(OSError, match="closed"):
        spool.append(points(5))
    assert not (folder / "sent.json").exists()
    assert drained(other) == points(0, 1)
    assert json.loads((folder / "sent.json").read_text()) == {"bytes": (folder / "records.jsonl").stat().st_size}


def forged(text: bytes) -> bytes:
    """A line whose checksum is right, as anybody can write it."""
    return b"%08x %s\n" % (zlib.crc32(text), text)


POINT = b'{"kind":"point","key":"a","value":1.0,"step":%s,"timestamp_ms":1}'


@pytest.mark.parametrize(
    "text",
    [
        b"3", b"null", b"[]", b"{}", b"[" * 100_000, b'{"kind":["point"]}', b'{"kind":"point"}', b"\xff", b"",
        POINT % b'"x"', POINT % b"null", POINT % b"[1]", POINT % (b"9" * 5000), POINT % b"9223372036854775808",
        POINT % b"1e400", b'{"kind":"point","key":3,"value":1.0,"step":1,"timestamp_ms":1}',
        b'{"kind":"tags","values":[]}', b'{"kind":"tags","values":{"a":{}}}', b'{"kind":"params","values":{"a":1}}',
        b'{"kind":"upload","path":3,"folder":""}', b'{"kind":"upload","path":"x","folder":null}',
        b'{"kind":"end","status":"SAD","timestamp_ms":1}', b'{"kind":"version","path":"x"}', b'{"kind":"__class__"}',
    ],
    ids=count(),
)  # fmt: skip
def test_a_forged_line_is_left_out(folder: Path, text: bytes) -> None:
    spool = Spool(folder)
    spool.append(points(0))
    spool.close()
    with (folder / "records.jsonl").open("ab") as stream:
        stream.write(forged(text) + to_line(points(1)[0]))
    assert drained(Spool(folder)) == points(0, 1)


@pytest.mark.parametrize("said", ["-1", "1e300", '"x"', "null", "true", "[1]", "9" * 5000, "1" * 30])
def test_a_note_of_what_was_sent_that_cannot_be_is_not_believed(folder: Path, said: str) -> None:
    spool = Spool(folder)
    spool.append(points(0, 1))
    spool.close()
    (folder / "sent.json").write_text(f'{{"bytes": {said}}}')
    assert drained(Spool(folder)) == points(0, 1)


def test_a_spool_writes_through_no_link_and_waits_for_no_pipe(folder: Path, tmp_path: Path) -> None:
    """Records are cut where the last whole one ends: through a link this would empty a file of the user's."""
    target = tmp_path / "precious"
    target.write_text("precious")
    folder.mkdir(parents=True)
    (folder / "records.jsonl").symlink_to(target)
    with pytest.raises(UserError, match=r"records\.jsonl'.*regular file"):
        Spool(folder)
    (folder / "records.jsonl").unlink()
    os.mkfifo(folder / "records.jsonl")
    with pytest.raises(UserError, match=r"records\.jsonl'.*regular file"):
        Spool(folder)
    (folder / "records.jsonl").unlink()
    (tmp_path / "other").mkdir()
    (folder / "files").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=r"files' is a link"):
        Spool(folder)
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=r"spool' is a link"):
        Spool(folder)
    assert target.read_text() == "precious"
    assert list((tmp_path / "other").iterdir()) == []


def test_a_spool_has_a_limit_that_a_run_keeps_and_a_reader_checks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "LIMIT", 500)
    spool = Spool(folder)
    spool.append(points(0, 1))
    with pytest.raises(OSError, match="the spool is full"):
        spool.append(points(*range(2, 20)))
    assert drained(spool) == points(0, 1)
    spool.close()
    with (folder / "records.jsonl").open("ab") as stream:
        stream.truncate(501)
    with pytest.raises(UserError, match="is larger than"):
        Spool(folder)


def test_a_line_without_an_end_takes_no_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_LINE", 4096)
    folder.mkdir(parents=True)
    with (folder / "records.jsonl").open("wb") as stream:
        stream.write(to_line(points(0)[0]))
        stream.truncate(1 << 20)
    assert drained(Spool(folder)) == points(0)
