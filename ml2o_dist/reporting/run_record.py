"""Records of runs and evaluations, read from their folders; pages are made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ml2o_dist.config import EvaluateSettings, MetaTrainSettings
from ml2o_dist.evaluation.evaluated import Evaluation
from ml2o_dist.rundir.log import RunLog


@dataclass(frozen=True)
class Record:
    """The content of a folder.

    Attributes:
        name: of the run or evaluation.  path: of its folder, or its URI.
        log: the content of run.log.
        unread: the files that cannot be read, by name in the folder, each with a line that gives the reason.
    """

    name: str
    path: str
    log: RunLog = field(default_factory=RunLog, kw_only=True)
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict, kw_only=True)

    @property
    def unread_lines(self) -> list[str]:
        """The lines of `unread`."""
        return [line for lines in self.unread.values() for line in lines]

    def why_not(self, name: str, otherwise: str) -> str:
        """Return why the file or folder `name` gave nothing: it cannot be read, or else `otherwise`."""
        lines = self.unread.get(name, ())
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        return f"{lines[0]}{more}" if lines else otherwise


@dataclass(frozen=True)
class EvaluationRecord(Record):
    """The content of an evaluation's folder; None for what is missing (so far)."""

    evaluation: Evaluation | None = None
    settings: EvaluateSettings | None = None


@dataclass(frozen=True)
class RunRecord(Record):
    """The content of a run's folder; None or empty for what is missing (so far).

    Attributes:
        history: a mapping for each meta-step, as in metrics.parquet.
        comparison: of the learned optimizer, at the end of the run.
        card: of the weights, as artifact.py writes it.
        checkpoint_step: of the newest valid checkpoint.  progress: the other figures in that checkpoint.
        trajectories: rows as `read_trajectories` returns them.
    """

    settings: MetaTrainSettings | None = None
    history: Sequence[Mapping[str, Any]] = ()
    comparison: Evaluation | None = None
    card: Mapping[str, Any] | None = None
    checkpoint_step: int | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    trajectories: pa.Table | None = None

    @property
    def meta_steps(self) -> int | None:
        """Meta-steps done, according to the metrics or a checkpoint; None if neither exists."""
        written = [row["meta_step"] for row in self.history]
        return max(written) if written else self.checkpoint_step
