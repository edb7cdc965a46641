"""The spool: a run's records for MLflow, written to the disk before sending, so that no kill or outage loses them.

    spool/records.jsonl   a line for each record (`records.to_line`), in the order in which they were made
    spool/sent.json       {"bytes": N}: MLflow has taken everything before byte N of records.jsonl
    spool/files/N/NAME    a copy of the file that the record at byte N uploads

A killed process may leave a torn last line, which is dropped. It may also leave an outdated sent.json, so that some
records are sent again: writing a record to MLflow twice must do no harm (see `MlflowRun`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import replacing
from ml2o_dist.runtime.reading import MIB, read_json_object
from ml2o_dist.tracking.records import End, Point, Record, Upload, Version, from_line, to_line
from ml2o_dist.tracking.run_files import copied

SPOOL_FOLDER = "spool"
"""The spool's name in a run directory."""

LIMIT = 4 * 1024 * MIB
"""Maximum bytes of records in a spool: weeks of a run whose server is away."""

_LINE = 16 * MIB
"""Maximum bytes of one record; a longer line is not a record."""

_RECORDS, _SENT, _FILES = "records.jsonl", "sent.json", "files"

_log = logging.getLogger("ml2o_dist.tracking")


@dataclass(frozen=True)
class Batch:
    """Records to be sent in one call.

    Attributes:
        end: the byte of the spool where they end; None if they are not from a spool.
        count: how many records of the spool they cover, including each skipped `End` that more records follow.
    """

    records: Sequence[Record]
    end: int | None = None
    count: int = 0


class Spool:
    """The records of one run that MLflow may not have yet. Safe to use from several threads, by one process at a time.

    Attributes:
        folder: the spool's folder.
        unsent: how many records MLflow has not taken.
        unsent_values: how many of the unsent records are metric values.
        removed: everything was sent and the folder is gone.
    """

    def __init__(self, folder: Path) -> None:
        """Open the spool in `folder`, or create one there.

        Raises:
            UserError: another process has it open, it is a link, or its records are no regular file or larger than
                `LIMIT`; OSError: it can be neither read nor created.
        """
        self.folder = folder
        self.removed = False
        self._lock = threading.Lock()
        shutil.rmtree(_removed_name(folder), ignore_errors=True)  # left by a process that was killed while removing it
        folder.mkdir(parents=True, exist_ok=True)
        self._records = folder / _RECORDS
        self._file: int | None = _opened(self._records)
        try:
            _claim(self._file, folder)
            self._end = _end_of_whole_lines(self._records)
            self._sent = _bytes_sent(folder)
            if self._sent > self._end:  # a power cut lost records; send all again before new ones are written
                (folder / _SENT).unlink()
                self._sent = 0
            self._count()
        except BaseException:
            self.close()
            raise

    def append(self, records: Sequence[Record]) -> None:
        """Write records and copies of the files they upload; all of them, or none if it raises OSError."""
        with self._lock:
            if self._file is None:
                raise OSError(f"{self.folder} was closed")
            content = bytearray()
            for record in records:
                content += to_line(self._kept(record, self._end + len(content)))
            if self._end + len(content) > LIMIT:
                raise OSError(errno.EFBIG, "the spool is full")
            try:
                os.ftruncate(self._file, self._end)  # a torn line, from a killed process or a full disk
                _write_all(self._file, content, self._end)
            except OSError:
                os.ftruncate(self._file, self._end)
                raise
            self._end += len(content)
            self.unsent += len(records)
            self.unsent_values += _values(records)

    def read(self, limit: int) -> Batch:
        """Return the next batch to send: up to `limit` points, or one other record; empty if all was sent."""
        with self._lock:
            records: list[Record] = []
            end, count = self._sent, 0
            for record, after in self._unsent_records():
                void = isinstance(record, End) and after < self._end
                if not void and records and not (isinstance(record, Point) and len(records) < limit):
                    break
                end, count = after, count + 1
                if not void:
                    records.append(self._found(record))
                    if not isinstance(record, Point):
                        break
            return Batch(records, end, count)

    def advance(self, batch: Batch) -> None:
        """Note that MLflow has accepted `batch`, which `read` returned last.

        If the note cannot be written, `batch` is sent again after a restart, which does no harm.
        """
        with self._lock:
            if self._file is None or batch.end is None:
                return
            self._sent = batch.end
            self.unsent -= batch.count
            self.unsent_values -= _values(batch.records)
            try:
                with replacing(self.folder / _SENT) as stream:
                    stream.write(json.dumps({"bytes": batch.end}).encode())
            except OSError as error:
                _log.info("%s cannot be written: %s", self.folder / _SENT, error.strerror or error)

    def rewind(self) -> None:
        """Mark all records as unsent, for a new run that has none of them."""
        with self._lock:
            self._sent = 0
            self._count()

    def flush(self) -> None:
        """Return when the disk has every record."""
        with self._lock:
            if self._file is not None:
                os.fsync(self._file)

    def remove(self) -> None:
        """Remove the spool atomically: a process that is killed here leaves all of it or nothing."""
        with self._lock:
            if self._file is None:
                return
            try:
                os.rename(self.folder, _removed_name(self.folder))
            except OSError as error:
                _log.warning("%s cannot be removed: %s", self.folder, error.strerror or error)
                return
            self.removed = True
            os.close(self._file)
            self._file = None
        shutil.rmtree(_removed_name(self.folder), ignore_errors=True)

    def close(self) -> None:
        """Release the spool for other processes; a thread that still uses it reads and changes nothing more."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _unsent_records(self) -> Iterator[tuple[Record, int]]:
        """Yield each whole record after the sent ones and the byte where it ends."""
        if self._file is None:
            return
        for record, after in _lines(self._records, self._sent):
            if after > self._end:
                return
            if record is not None:
                yield record, after

    def _count(self) -> None:
        found = [record for record, _ in self._unsent_records()]
        self.unsent, self.unsent_values = len(found), _values(found)

    def _kept(self, record: Record, position: int) -> Record:
        """Return `record` for writing at byte `position`: its file copied here, its path relative to the spool."""
        if isinstance(record, Upload):
            target = self.folder / _FILES / str(position) / record.path.name
            shutil.rmtree(target.parent, ignore_errors=True)  # belongs to a torn line
            try:
                target.parent.mkdir(parents=True)
                copied(record.path, self.folder.parent, target)
                return replace(record, path=target.relative_to(self.folder))
            except (FileNotFoundError, UserError) as error:  # sending will skip it with this reason
                _log.info("not kept in the spool: %s", error)
        if isinstance(record, Upload | Version):
            return replace(record, path=Path(os.path.relpath(record.path, self.folder)))
        return record

    def _found(self, record: Record) -> Record:
        if isinstance(record, Upload | Version):
            return replace(record, path=Path(os.path.normpath(self.folder / record.path)))
        return record


def unsent_values(folder: Path) -> int:
    """Return the number of unsent metric values in the spool in `folder`; 0 if there is no spool.

    Raises UserError if another process has it open.
    """
    if not (folder / _RECORDS).exists():
        return 0
    spool = Spool(folder)
    spool.close()
    return spool.unsent_values


def _claim(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it however the process ends
    except BlockingIOError:
        raise UserError(f"{folder.parent} is in use: the run that writes it is still going on") from None
    except OSError as error:  # a file system without locks
        _log.info("%s cannot be locked: %s", folder, error.strerror)


def _opened(file: Path) -> int:
    """Return a handle of the spool's records file, created if missing; raises UserError and OSError."""
    for folder in (file.parent, file.parent / _FILES):
        if folder.is_symlink():
            raise UserError(f"{str(folder)!r} is a link: a spool lies in its run directory")
    try:
        # Through a link another file would be overwritten; a FIFO would block.
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise UserError(f"{str(file)!r} is not a regular file") from error
        raise
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode) or about.st_size > LIMIT:
        os.close(handle)
        what = f"larger than {LIMIT // MIB} MiB" if stat.S_ISREG(about.st_mode) else "not a regular file"
        raise UserError(f"{str(file)!r} is {what}")
    return handle


def _lines(file: Path, start: int) -> Iterator[tuple[Record | None, int]]:
    """Yield for each line from byte `start`: its record (None: torn or altered), and the byte where it ends."""
    with file.open("rb") as stream:
        stream.seek(start)
        position = start
        while line := stream.readline(_LINE):
            position += len(line)
            yield from_line(line), position


def _end_of_whole_lines(file: Path) -> int:
    end, damaged, torn = 0, 0, 0
    for record, after in _lines(file, 0):
        torn += record is None
        if record is not None:
            end, damaged = after, torn
    if damaged:
        _log.warning("%s: %d damaged lines were left out", file, damaged)
    return end


def _bytes_sent(folder: Path) -> int:
    try:
        sent = read_json_object(folder / _SENT, "file", MIB, within=folder).get("bytes")
    except (FileNotFoundError, UserError):
        return 0  # sent again, which does no harm
    return sent if type(sent) is int and sent > 0 else 0


def _write_all(file: int, content: bytes | bytearray, position: int) -> None:
    rest = memoryview(content)
    while rest:
        written = os.pwrite(file, rest, position)
        rest, position = rest[written:], position + written


def _values(records: Sequence[Record]) -> int:
    return sum(isinstance(record, Point) for record in records)


def _removed_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.sent")
