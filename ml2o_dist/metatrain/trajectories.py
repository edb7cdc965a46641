"""Recorded trajectories as a Parquet data set: one file for each recorded meta-step, one row for each inner step.

Any Parquet reader (DuckDB, pandas, Ray Data) can read `RUN_DIR/trajectories/*.parquet`. The `description` of each
Arrow field in `SCHEMA`, which every file carries, says what the column holds.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ml2o_dist.metatrain.episode import EpisodeResult
from ml2o_dist.metatrain.recorder import Trajectory
from ml2o_dist.metatrain.schedule import WorkItem
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import replacing
from ml2o_dist.runtime.reading import one_line
from ml2o_dist.runtime.reading_tables import read_table

FOLDER = "trajectories"
_NAME = re.compile(r"step_(\d{6,})\.parquet")

log = logging.getLogger(__name__)


def _column(name: str, kind: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata={"description": description})


_FLOATS = pa.list_(pa.field("element", pa.float32(), nullable=False))

SCHEMA = pa.schema(
    [
        _column(
            "meta_step",
            pa.int32(),
            "number of the meta-step, from 1, as in metrics.parquet: the weights had meta_step - 1 updates before it",
        ),
        _column("slot", pa.int32(), "number of the episode within its meta-step, from 0"),
        _column("instance", pa.int32(), "number of the problem instance within its episode, from 0"),
        _column("problem", pa.dictionary(pa.int32(), pa.string()), "the problem with its settings, as --problem"),
        _column("seed", pa.int64(), "names all randomness of the episode"),
        _column("step", pa.int32(), "inner step k, from 0: the step leads from z_k to z_{k+1}"),
        _column("losses", _FLOATS, "f_i(z_k) of every objective on the step's batch"),
        _column("gradient_norms", _FLOATS, "|g_i| of every objective at z_k on the step's batch"),
        _column(
            "gradient_cosines",
            _FLOATS,
            "cos(g_i, g_j) of the pairs (0,1), (0,2), ..., (1,2), ...; below 0: in conflict; 0 for a zero gradient",
        ),
        _column("update_norm", pa.float32(), "|z_{k+1} - z_k|, after projection onto the problem's box"),
        _column(
            "descent_cosine",
            pa.float32(),
            "cos(z_{k+1} - z_k, -mean_i g_i): 1 is straight descent of the mean objective; 0 where either is zero",
        ),
    ],
    metadata={"description": "ml2o_dist: inner steps of recorded meta-training episodes", "format": "2"},
)
"""The columns of every file. A nan stays a nan, so that an episode that diverged is recorded unchanged.

In format 1, meta-steps were counted from 0, in the file names too.
"""


@dataclass(frozen=True)
class Recorded:
    """The readable part of a run's trajectories.

    Attributes:
        rows: inner steps with `SCHEMA`, ordered by meta-step, slot, instance and step.
        unread: one line for each file left out, with its name and the reason.
    """

    rows: pa.Table
    unread: tuple[str, ...]


@dataclass(frozen=True)
class RecordedProblem:
    """Counts for one recorded problem: distinct meta-steps, episodes (of P instances each), inner steps (rows)."""

    problem: str
    objectives: int
    meta_steps: tuple[int, ...]
    episodes: int
    inner_steps: int


def episodes_table(episodes: Sequence[tuple[WorkItem, Trajectory]]) -> pa.Table:
    """Return the rows of recorded episodes in the order of their instances and steps, with `SCHEMA`."""
    parts = [_episode_table(item, trajectory) for item, trajectory in episodes]
    return pa.concat_tables(parts).unify_dictionaries().combine_chunks() if parts else SCHEMA.empty_table()


class TrajectoryWriter:
    """Writes recorded episodes in a separate thread, to which the training loop passes them.

    Files are written atomically. A meta-step that is repeated replaces its file by an equal one. If a file cannot be
    written, the writer warns once and the run goes on. Meta-steps are counted from 1.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trajectories")
        self._pending: list[Future[None]] = []
        self._warned = False

    def add(self, meta_step: int, items: Sequence[WorkItem], results: Sequence[EpisodeResult]) -> None:
        """Queue the recorded episodes of `meta_step`, if there are any, and return at once."""
        episodes = [(i, r.trajectory) for i, r in zip(items, results, strict=True) if r.trajectory is not None]
        if episodes:
            self._pending.append(self._thread.submit(self._write, meta_step, episodes))

    def flush(self) -> None:
        """Wait until every queued file is written, or its failure was warned of."""
        wait(self._pending)
        for done in self._pending:
            done.result()
        self._pending.clear()

    def discard_from(self, meta_step: int) -> None:
        """Remove the files of `meta_step` and later ones: a run that resumes from there writes them again.

        A new run in the folder of a killed one thereby keeps none of that run's files.
        """
        for step, file in _files(self._run_dir / FOLDER):
            if step >= meta_step:
                try:
                    file.unlink()
                except OSError as error:
                    self._warn(f"{file} of an earlier run cannot be removed: {error.strerror or error}")

    def _write(self, meta_step: int, episodes: Sequence[tuple[WorkItem, Trajectory]]) -> None:
        table = episodes_table(episodes)
        try:
            with replacing(self._run_dir / FOLDER / f"step_{meta_step:06d}.parquet") as stream:
                pq.write_table(table, stream, compression="zstd", use_dictionary=["problem"])
        except OSError as error:
            self._warn(f"trajectories of meta-step {meta_step} cannot be written: {error.strerror or error}")

    def _warn(self, what: str) -> None:
        if not self._warned:
            log.warning("%s; the run goes on, and this is said once", what)
        self._warned = True


def read_trajectories(run_dir: Path, problem: str | None = None) -> Recorded:
    """Return the recorded inner steps of a run, all or one problem's.

    Files that cannot be read are left out and named.

    Raises:
        UserError: nothing is recorded in `run_dir`, no file can be read, or the problem was not recorded.
    """
    files = _files(run_dir / FOLDER)
    if not files:
        raise UserError(f"no trajectories in {run_dir / FOLDER}: not a run, or one with trajectories.meta_steps=0")
    tables, unread = [], []
    for _, file in files:
        try:
            tables.append(_read(file))
        except UserError as error:
            unread.append(str(error))
    if not tables:
        others = f"; nor can the other {len(files) - 1} files" if len(files) > 1 else ""
        raise UserError(f"{unread[0]}{others}")
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    if problem is not None:
        name = _recorded_name(problem, pc.unique(table["problem"]).to_pylist())
        table = table.filter(pc.equal(table["problem"].cast(pa.string()), name))
    return Recorded(table, tuple(unread))


def recorded_problems(table: pa.Table) -> list[RecordedProblem]:
    """Summarise the rows that `read_trajectories` returned, by problem, in name order."""
    names = np.array(table["problem"].cast(pa.string()).to_pylist(), dtype=object)
    meta_steps, slots = table["meta_step"].to_numpy(), table["slot"].to_numpy()
    objectives = pc.list_value_length(table["losses"]).to_numpy()
    summaries = []
    for name in sorted(set(names)):
        rows = names == name
        episodes = set(zip(meta_steps[rows].tolist(), slots[rows].tolist(), strict=True))
        steps = tuple(sorted({step for step, _ in episodes}))
        summaries.append(RecordedProblem(name, int(objectives[rows][0]), steps, len(episodes), int(rows.sum())))
    return summaries


def _recorded_name(problem: str, names: Sequence[str]) -> str:
    """Return the one of the recorded `names` that `problem` means; its settings may be in any order."""
    if problem in names:
        return problem
    try:
        sorted_name = str(ProblemSpec.parse(problem))
    except UserError:
        sorted_name = problem
    if sorted_name in names:
        return sorted_name
    (nearest,) = difflib.get_close_matches(sorted_name, names, n=1, cutoff=0)
    raise UserError(f"nothing is recorded of problem {problem!r}; the nearest of {len(names)} that are: {nearest!r}")


def _files(folder: Path) -> list[tuple[int, Path]]:
    """Return the data files with their meta-steps, in order, without those that a killed process left half-written."""
    found = [(match, path) for path in folder.glob("step_*") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match.group(1)), path) for match, path in found)


def _read(file: Path) -> pa.Table:
    table = read_table(file, SCHEMA, file.parent)
    if not table.schema.equals(SCHEMA):
        raise UserError(f"{file} cannot be read: it has other columns than this version of ml2o_dist writes")
    if (written := (table.schema.metadata or {}).get(b"format")) != SCHEMA.metadata[b"format"]:
        given, wanted = one_line((written or b"?").decode(errors="replace")), SCHEMA.metadata[b"format"].decode()
        raise UserError(f"{file} cannot be read: its format is {given}, this version of ml2o_dist reads {wanted}")
    if not _are_episodes(table):
        raise UserError(f"{file} cannot be read: its rows are no inner steps of episodes")
    return table


def _are_episodes(table: pa.Table) -> bool:
    """Tell whether there are rows, each an inner step with one list entry for each objective of its problem."""
    problems = table["problem"].cast(pa.string())
    if not len(table) or problems.null_count or any(table[name].null_count for name in SCHEMA.names):
        return False
    losses, norms, cosines = (
        pc.list_value_length(table[name]).to_numpy() for name in ("losses", "gradient_norms", "gradient_cosines")
    )
    if (losses < 1).any() or (norms != losses).any() or (cosines != losses * (losses - 1) // 2).any():
        return False
    numbers = np.array([table[name].to_numpy() for name in ("meta_step", "slot", "instance", "step")])
    begins, goes_on = numbers[3] == 0, (np.diff(numbers[:3]) == 0).all(axis=0) & (np.diff(numbers[3]) == 1)
    codes = np.unique(np.array(problems.to_pylist(), dtype=object), return_inverse=True)[1]
    same = len(np.unique(np.stack([codes, losses]), axis=1).T) == len(np.unique(codes))
    return bool((numbers >= 0).all() and begins[0] and (begins[1:] | goes_on).all() and same)


def _episode_table(item: WorkItem, trajectory: Trajectory) -> pa.Table:
    steps, instances, _ = trajectory.losses.shape
    count = steps * instances

    def same(value: int) -> NDArray[np.int64]:
        return np.full(count, value, dtype=np.int64)

    def by_instance(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(values.swapaxes(0, 1)).reshape(count, -1)

    columns = {
        "meta_step": same(item.key.number),
        "slot": same(item.key.slot),
        "instance": np.repeat(np.arange(instances), steps),
        "problem": pa.DictionaryArray.from_arrays(np.zeros(count, dtype=np.int32), [str(item.spec.problem)]),
        "seed": same(item.spec.seed),
        "step": np.tile(np.arange(steps), instances),
        "losses": _lists(by_instance(trajectory.losses)),
        "gradient_norms": _lists(by_instance(trajectory.gradient_norms)),
        "gradient_cosines": _lists(by_instance(trajectory.gradient_cosines)),
        "update_norm": by_instance(trajectory.update_norms)[:, 0],
        "descent_cosine": by_instance(trajectory.descent_cosines)[:, 0],
    }
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _lists(rows: NDArray[np.float32]) -> pa.ListArray:
    """Return one list for each row of [R, c]; c may be 0."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.reshape(-1)), type=_FLOATS)
