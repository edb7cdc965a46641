"""What is known of a run, read back from its folder: what its page is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.evaluation.benchmark import Comparison
from ml2o_dist.run_log import RunLog


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run; what is not there (yet) is None or empty.

    Attributes:
        name: of the run.  path: of its folder, or its URI.
        history: a mapping for each meta-step, as in metrics.parquet.
        card: of the weights, as artifact.py writes it.
        checkpoint_step: of the newest checkpoint that holds.  progress: what it says besides.
        log: what run.log says.
        trajectories: rows as `read_trajectories` returns them.
        unread: by name in the run's folder, what cannot be read of it and why, a line for each file.
    """

    name: str
    path: str
    settings: MetaTrainSettings | None = None
    history: Sequence[Mapping[str, Any]] = ()
    comparison: Comparison | None = None
    card: Mapping[str, Any] | None = None
    checkpoint_step: int | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    trajectories: pa.Table | None = None
    log: RunLog = field(default_factory=RunLog)
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def meta_steps(self) -> int | None:
        """Meta-steps done, as far as metrics or a checkpoint say; None where neither is there."""
        written = [row["meta_step"] for row in self.history]
        return max(written) if written else self.checkpoint_step

    @property
    def unread_lines(self) -> list[str]:
        """What cannot be read, line by line."""
        return [line for lines in self.unread.values() for line in lines]

    def why_not(self, name: str, otherwise: str) -> str:
        """Say why there is nothing of the file or folder `name`: it cannot be read, or `otherwise`."""
        lines = self.unread.get(name, ())
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        return f"{lines[0]}{more}" if lines else otherwise
