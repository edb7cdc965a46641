"""What is known of a run or of an evaluation, read back from its folder: what its page is made from."""

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
    """What is known of a folder.

    Attributes:
        name: of the run or evaluation.  path: of its folder, or its URI.
        log: what run.log says.
        unread: by name in the folder, what cannot be read of it and why, a line for each file.
    """

    name: str
    path: str
    log: RunLog = field(default_factory=RunLog, kw_only=True)
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict, kw_only=True)

    @property
    def unread_lines(self) -> list[str]:
        """What cannot be read, line by line."""
        return [line for lines in self.unread.values() for line in lines]

    def why_not(self, name: str, otherwise: str) -> str:
        """Say why there is nothing of the file or folder `name`: it cannot be read, or `otherwise`."""
        lines = self.unread.get(name, ())
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        return f"{lines[0]}{more}" if lines else otherwise


@dataclass(frozen=True)
class EvaluationRecord(Record):
    """What is known of an evaluation; what is not there (yet) is None."""

    evaluation: Evaluation | None = None
    settings: EvaluateSettings | None = None


@dataclass(frozen=True)
class RunRecord(Record):
    """What is known of a run; what is not there (yet) is None or empty.

    Attributes:
        history: a mapping for each meta-step, as in metrics.parquet.
        comparison: of the learned optimizer, at the end of the run.
        card: of the weights, as artifact.py writes it.
        checkpoint_step: of the newest checkpoint that holds.  progress: what it says besides.
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
        """Meta-steps done, as far as metrics or a checkpoint say; None where neither is there."""
        written = [row["meta_step"] for row in self.history]
        return max(written) if written else self.checkpoint_step
