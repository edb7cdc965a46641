"""The figures of a run as Parquet, `RUN_DIR/metrics.parquet`: one row for each meta-step, and one for the start.

The `description` of each Arrow field in `SCHEMA`, which the file carries, says what the column holds.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import replacing
from ml2o_dist.runtime.reading_tables import read_table

FILE = "metrics.parquet"


def _column(name: str, kind: pa.DataType, description: str, *, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})


SCHEMA = pa.schema(
    [
        _column(
            "meta_step",
            pa.int64(),
            "number of the meta-step, from 1; the row of 0 is the untrained network, with its validation alone",
            nullable=False,
        ),
        _column("horizon", pa.int64(), "K, inner steps of every training episode of the meta-step"),
        _column("lag", pa.int64(), "updates between the weights that its episodes ran under and those that it changed"),
        _column("meta_loss", pa.float64(), "mean of the training episodes that were finite; other problems each time"),
        _column("validation", pa.float64(), "mean score on family.validation of the average weights after the step"),
        _column("gradient_norm", pa.float64(), "of the reduced meta-gradient, before learner.clip"),
        _column("learning_rate", pa.float64(), "of the meta-optimizer in this step"),
        _column("skipped_episodes", pa.int64(), "training episodes left out: those that failed or were not finite"),
        _column("failed_episodes", pa.int64(), "those of them that raised twice (faults.on_error=skip)"),
        _column("inner_steps_per_s", pa.float64(), "inner steps of training per second, over all workers"),
        _column("result_bytes", pa.int64(), "meta-gradients that came back from the workers"),
        _column("seconds", pa.float64(), "wall time since the meta-step before, validation and checkpoints included"),
        _column("learner_share", pa.float64(), "share of it in which no episode was waited for: updates, checkpoints"),
        _column("worker_utilisation", pa.float64(), "seconds of the episodes used, over this time and all workers"),
    ],
    metadata={"description": "ml2o_dist: figures of a meta-training by meta-step"},
)
"""The columns of the file. Values not measured are null: validation at most meta-steps, the rest at meta-step 0."""


Row = dict[str, float]
"""One meta-step's figures by name, without those that were not measured or are nan."""


class History:
    """The rows of a run in memory, as columns: eight bytes a figure, however long the run is.

    Attributes:
        columns: the figures by name, float64, nan where a row has none; all are of one length.
    """

    def __init__(self, columns: Mapping[str, Iterable[float]] | None = None) -> None:
        self.columns = {name: array("d", values) for name, values in (columns or {"meta_step": ()}).items()}

    def __len__(self) -> int:
        return len(self.columns["meta_step"])

    def __getitem__(self, place: int) -> Row:
        return {name: column[place] for name, column in self.columns.items() if not math.isnan(column[place])}

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def add(self, meta_step: int, figures: Row) -> None:
        """Put figures into the row of `meta_step`, which is the last row or a new one after it; a nan is left out."""
        steps = self.columns["meta_step"]
        if not steps or steps[-1] != meta_step:
            for column in self.columns.values():
                column.append(math.nan)
            steps[-1] = meta_step
        for name, figure in figures.items():
            if name not in self.columns:
                self.columns[name] = array("d", [math.nan]) * len(self)
            if not math.isnan(figure):
                self.columns[name][-1] = figure


def write_history(run_dir: Path, history: History) -> None:
    """Write the rows in order, with the columns of `SCHEMA`; raise OSError if that fails."""
    none = np.full(len(history), math.nan)
    columns = [  # nan becomes null
        pa.array(np.array(history.columns.get(field.name, none)), pa.float64(), from_pandas=True).cast(field.type)
        for field in SCHEMA
    ]
    table = pa.Table.from_arrays(columns, schema=SCHEMA)
    with replacing(run_dir / FILE) as stream:
        pq.write_table(table, stream)


def read_history(file: Path, within: Path | None = None) -> list[dict[str, Any]]:
    """Return the rows of a file, keyed as in `SCHEMA`; missing values are None.

    Raises:
        UserError: the file is of another kind, torn, or too large.
    """
    table = read_table(file, SCHEMA, within)
    if "meta_step" not in table.column_names:
        raise UserError(f"{file} cannot be read: no column meta_step")
    if table["meta_step"].null_count:
        raise UserError(f"{file} cannot be read: a row has no meta_step")
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type) for field in SCHEMA
    ]
    rows: list[dict[str, Any]] = pa.Table.from_arrays(columns, schema=SCHEMA).to_pylist()
    return rows
