"""Storage of a run: a local folder, or a URI of any file system that pyarrow knows (s3, gs, abfs, hdfs, file).

A run at a URI is written in a local working copy, and a separate thread commits changed files to the remote place.
Files are not renamed there, since object stores cannot do that: the files of a checkpoint are written first and its
manifest last. Every reader refuses a checkpoint without a manifest or with a hash that differs, so writing the manifest
commits the checkpoint. In the same way the card commits the weights.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path, PurePosixPath

from pyarrow.fs import FileSelector, FileSystem, FileType

from ml2o_dist.config_file import dump_settings, first_difference, parse_settings
from ml2o_dist.metatrain.checkpoint import Checkpoint, newest_checkpoint
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import cache_folder, home_folder, replacing
from ml2o_dist.runtime.reading import MIB, YAML_LIMIT, read_bytes
from ml2o_dist.runtime.remote_files import answering, bare, check_remote, connect, is_uri, reason

LOCAL_ONLY = "spool"
"""The folder of a working copy with values not yet sent to MLflow; it is neither committed nor replaced."""

FILE_LIMIT = 16 * 1024 * MIB
"""Most bytes of a file that is fetched: those of the largest checkpoint."""

_CHECKPOINT = re.compile(r"checkpoints/(step_(\d{6,}))/(.+)")

log = logging.getLogger(__name__)

Stamp = tuple[int, int, int]
"""Inode, size and time of a file. Our files are replaced, not modified, so equal stamps mean equal content."""


class StorageError(Exception):
    """The working copy could not be committed to the remote place; the message is one line and says why."""


class RunStorage:
    """A run in a local folder: the folder is the run directory, and there is nothing to commit.

    Attributes:
        name: the run's name for the user: the absolute path, or the URI.
        folder: the local folder in which its files are written and read.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder

    @property
    def title(self) -> str:
        """The last part of the name, without a URI's query."""
        return self.folder.name

    def named(self, text: str) -> str:
        """Return `text` with the name of the run in place of its folder's path."""
        return text.replace(str(self.folder), self.name)

    def commit(self) -> None:
        """Start to commit changed files to the remote place; return at once."""

    def settle(self) -> None:
        """Wait until the remote place has all files; raise StorageError if that fails."""

    def forget(self) -> None:
        """Remove a committed working copy, unless it has values to send to MLflow."""


def open_storage(run_dir: Path | str, *, resume: bool = False) -> RunStorage:
    """Return the storage of a run; for a URI, check that it can be written and refresh the working copy from it.

    A relative folder is resolved against ML2O_HOME. The working copy of a URI lies in the cache folder.

    Raises:
        UserError: no name, an unknown scheme, a password in the URI, or a place that does not answer or cannot be
            written.
    """
    if not str(run_dir):
        raise UserError("--run-dir is empty (a variable of the shell that is not set?)")
    if not is_uri(run_dir):
        folder = home_folder() / run_dir
        return RunStorage(str(folder), folder)
    uri, filesystem, base = connect(str(run_dir), "run directory")
    storage = RemoteRunStorage(uri, filesystem, base, working_copy(uri))
    storage.check_writable()
    storage.refresh(resume=resume)
    return storage


def working_copy(uri: str) -> Path:
    """Return the local working copy of a run at `uri`; its spool stays there until it is sent."""
    return cache_folder() / "runs" / sha256(bare(uri).encode()).hexdigest()[:16]


@contextmanager
def read_run(run_dir: Path | str) -> Iterator[Path]:
    """Yield a local folder with the files of a run, which may be at a URI, for the time of a `with` block.

    A run at a URI is downloaded to a temporary folder, which does not disturb a process that writes to it. Raises
    UserError; a UserError from the block is raised with the URI in place of the folder.
    """
    if not is_uri(run_dir):
        yield home_folder() / run_dir
        return
    uri, filesystem, base = connect(str(run_dir), "run directory")
    with tempfile.TemporaryDirectory(prefix="ml2o-run-") as folder:
        storage = RemoteRunStorage(uri, filesystem, base, Path(folder))
        storage.download(Path(folder))
        try:
            yield Path(folder)
        except UserError as error:
            raise UserError(storage.named(str(error))) from error


class RemoteRunStorage(RunStorage):
    """A run at a URI, written in a local working copy. One process at a time may write to a URI."""

    def __init__(self, uri: str, filesystem: FileSystem, base: str, folder: Path) -> None:
        """`base` is the run's path in `filesystem`; nothing is read or written yet."""
        super().__init__(uri, folder)
        self._filesystem = filesystem
        self._base = base
        self._committed: dict[str, Stamp] = {}  # stamps of the files that are equal at the remote place
        self._remote_steps: set[str] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="run-storage")
        self._waiting: Future[None] | None = None
        self._away = False

    @property
    def title(self) -> str:
        return self._base.rpartition("/")[2]

    def check_writable(self) -> None:
        """Raise UserError unless a file can be written and removed at the remote place."""
        with answering(f"run directory {self.name!r} cannot be written"):
            self._write(".writable", b"")
            self._filesystem.delete_file(f"{self._base}/.writable")

    def refresh(self, *, resume: bool) -> None:
        """Make the working copy equal to the remote place, which is authoritative.

        The one exception is a working copy that is ahead because the remote place did not answer. The results of its
        additional steps are a function of the settings, so they need not be repeated.
        config.yaml is taken from the newest valid checkpoint, since a truncated config.yaml could pass for a whole one.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=".fetched-") as fetched:
                self._take_over(Path(fetched), resume)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"working copy {str(self.folder)!r} of {self.name} cannot be written: {reason}") from error

    def _take_over(self, fetched: Path, resume: bool) -> None:
        stamps = self.download(fetched)
        there, _ = newest_checkpoint(fetched / "checkpoints")
        if _is_further(self.folder, fetched, there, resume):
            return
        for path in self.folder.iterdir():
            if path.name != LOCAL_ONLY:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in fetched.iterdir():
            path.rename(self.folder / path.name)
        self._committed = stamps
        if there is not None:
            with replacing(self.folder / "config.yaml") as stream:
                stream.write(dump_settings(parse_settings(there.state.get("config"))).encode())

    def download(self, folder: Path) -> dict[str, Stamp]:
        """Fetch the run's files into `folder`; return their stamps by relative path. Raises UserError."""
        stamps = {}
        with answering(f"run directory {self.name!r} cannot be read"):
            selector = FileSelector(self._base, allow_not_found=True, recursive=True)
            for info in self._filesystem.get_file_info(selector):
                path = PurePosixPath(info.path).relative_to(self._base)
                name = path.as_posix()
                if ".." in path.parts or "\0" in name:  # an object may have any name
                    raise UserError(f"run directory {self.name!r} has a file {name!r}, which lies outside of it")
                if found := re.match(r"checkpoints/(step_\d{6,})", name):
                    self._remote_steps.add(found[1])
                ours = path.parts[0] != LOCAL_ONLY and not any(part.startswith(".") for part in path.parts)
                if info.type != FileType.File or not ours:
                    continue
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                check_remote(info, f"file {name!r} of run directory {self.name!r}", FILE_LIMIT)
                with self._filesystem.open_input_stream(info.path) as stream, target.open("xb") as copy:
                    shutil.copyfileobj(stream, copy, MIB)
                stamps[name] = _stamp(target)
        return stamps

    def commit(self) -> None:
        if self._waiting is None or self._waiting.running() or self._waiting.done():  # else a commit is queued already
            self._waiting = self._thread.submit(self._try_to_commit)

    def settle(self) -> None:
        try:
            self._thread.submit(self._commit).result()
        except Exception as error:  # as in _try_to_commit
            raise StorageError(reason(error)) from error
        finally:
            self._thread.shutdown()

    def forget(self) -> None:
        if not (self.folder / LOCAL_ONLY).exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _try_to_commit(self) -> None:
        """Commit; if that fails, warn once per outage and leave it to the next commit."""
        try:
            self._commit()
        except Exception as error:  # no error of a file system may end the training
            if not self._away:
                log.warning(
                    "%s cannot be written; training goes on in %s and tries again at each checkpoint: %s",
                    self.name,
                    self.folder,
                    reason(error),
                )
            self._away = True
        else:
            if self._away:
                log.warning("%s can be written again", self.name)  # the log that has the outage
            self._away = False

    def _commit(self) -> None:
        """Write changed files, each commit marker after its files; then remove checkpoints that are gone locally."""
        steps: dict[str, bool] = {}  # whether each step is complete, newest first
        for name in sorted(self._names(), key=_commit_order):
            found = _CHECKPOINT.fullmatch(name)
            step = found[1] if found else ""
            if not steps.setdefault(step, True):
                continue
            try:
                stamp = _stamp(self.folder / name)
                if self._committed.get(name) == stamp:
                    continue
                content = (self.folder / name).read_bytes()
            except FileNotFoundError:
                steps[step] = step == ""  # the checkpoint was pruned meanwhile, or the file replaced
                continue
            if step:
                self._remote_steps.add(step)
            self._write(name, content)
            self._committed[name] = stamp
        steps.pop("", None)
        if next(iter(steps.values()), False):  # only if the newest one is complete may earlier ones go
            for step in sorted(self._remote_steps - steps.keys()):
                self._remove_checkpoint(step)

    def _names(self) -> Iterator[str]:
        """Yield the relative paths of the run's files, without the spool and half-written or half-removed files."""
        for path, folders, files in os.walk(self.folder):
            below = Path(path).relative_to(self.folder)
            local = {LOCAL_ONLY} if Path(path) == self.folder else set()
            folders[:] = [name for name in folders if name not in local and not name.startswith((".", "tmp_"))]
            yield from ((below / name).as_posix() for name in files if not name.startswith("."))

    def _write(self, name: str, content: bytes) -> None:
        path = f"{self._base}/{name}"
        try:
            stream = self._filesystem.open_output_stream(path)
        except FileNotFoundError:  # not an object store: the folder must be created
            self._filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            stream = self._filesystem.open_output_stream(path)
        with stream:
            stream.write(content)

    def _remove_checkpoint(self, step: str) -> None:
        """Remove a checkpoint, its manifest first: the rest without it is no checkpoint."""
        folder = f"{self._base}/checkpoints/{step}"
        manifest = f"{folder}/manifest.json"
        if self._filesystem.get_file_info(manifest).type == FileType.File:
            self._filesystem.delete_file(manifest)
        if self._filesystem.get_file_info(folder).type == FileType.Directory:
            self._filesystem.delete_dir(folder)
        self._remote_steps.discard(step)
        for name in [name for name in self._committed if name.startswith(f"checkpoints/{step}/")]:
            del self._committed[name]


def _is_further(here: Path, there: Path, whole: Checkpoint | None, resume: bool) -> bool:
    """Tell whether folder `here` continues the run in `there`, whose newest valid checkpoint is `whole`.

    If nothing of the run reached the remote place, only `resume` shows that the user means the run in `here`.
    """
    ours, _ = newest_checkpoint(here / "checkpoints")
    first, second = here / "config.yaml", there / "config.yaml"
    if whole is None and not second.is_file():
        return resume and (ours is not None or first.is_file())
    if ours is None:
        return False
    if whole is None:
        return first.is_file() and len({read_bytes(each, "config file", YAML_LIMIT) for each in (first, second)}) == 1
    if ours.meta_step <= whole.meta_step or _tracking_run(ours) != _tracking_run(whole):
        return False
    return not first_difference(*(parse_settings(checkpoint.state.get("config")) for checkpoint in (ours, whole)))


def _tracking_run(checkpoint: Checkpoint) -> str:
    progress = checkpoint.state.get("progress")
    return str(progress.get("tracking_run")) if isinstance(progress, dict) else ""


def _commit_order(name: str) -> tuple[bool, int, int, str]:
    """Return the sort key for commits: checkpoints last, the newest first; commit markers after their files."""
    found = _CHECKPOINT.fullmatch(name)
    marker = 2 if name.endswith("manifest.json") else int(name.endswith(".json"))
    return found is not None, -int(found[2]) if found else 0, marker, name


def _stamp(file: Path) -> Stamp:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
