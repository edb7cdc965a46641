"""Results that the functions of the Python interface return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ml2o_dist.evaluation.evaluated import Evaluation


@dataclass(frozen=True)
class Result(ABC):
    """The result of a finished call.

    Attributes:
        answer: the command's output with `--json`.
    """

    answer: dict[str, Any]

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of `to_pandas`."""

    def to_pandas(self) -> Any:
        """Return the figures as a pandas DataFrame."""
        import pyarrow as pa  # late: results of a command need no table

        return pa.Table.from_pylist(self.rows()).to_pandas()

    @abstractmethod
    def plot(self) -> Figure:
        """Return the picture as a matplotlib Figure; a notebook shows it."""

    @property
    def run_dir(self) -> str:
        """The run directory: an absolute path or a URI."""
        return str(self.answer["run_dir"])


class MetaTrainResult(Result):
    """A finished meta-training: `to_pandas` has a row for each meta-step."""

    @property
    def weights(self) -> str:
        """The weights, as `load_artifact` and the optimizers take them."""
        return self.run_dir

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.parquet."""
        from ml2o_dist.metatrain.history import FILE, read_history
        from ml2o_dist.rundir.storage import read_run

        with read_run(self.run_dir) as folder:
            return read_history(folder / FILE, within=folder)

    def plot(self) -> Figure:
        """Return validation and meta-loss against the meta-step."""
        from ml2o_dist.reporting.plots import meta_loss_figure

        return meta_loss_figure(self.rows())


@dataclass(frozen=True)
class EvaluationResult(Result):
    """A comparison: `to_pandas` has a row for each optimizer, problem and seed."""

    evaluation: Evaluation

    def rows(self) -> list[dict[str, Any]]:
        """Return the cells."""
        return [dict(cell) for cell in self.answer["cells"]]

    def plot(self) -> Figure:
        """Return the learning curves, a panel for each problem."""
        from ml2o_dist.reporting.evaluation_plots import curves_figure
        from ml2o_dist.runtime.errors import UserError

        figure = curves_figure(self.evaluation)
        if figure is None:
            raise UserError("there is nothing to draw: no cell has finished")
        return figure


class SweepResult(Result):
    """A finished sweep: `to_pandas` has a row for each trial."""

    def rows(self) -> list[dict[str, Any]]:
        """Return the trials, their values as columns of their own."""
        found = []
        for trial in self.answer["trials"]:
            values = trial.get("values", {})
            found.append({**{k: v for k, v in trial.items() if k != "values"}, **values})
        return found

    def plot(self) -> Figure:
        """Return how the best score fell."""
        from ml2o_dist.reporting.sweep_plots import progress_figure
        from ml2o_dist.runtime.errors import UserError
        from ml2o_dist.sweeping.record import SweepRecord

        figure = progress_figure(SweepRecord(Path(self.run_dir)))
        if figure is None:
            raise UserError("there is nothing to draw: no trial has a score")
        return figure


class ParetoSetResult(Result):
    """A Pareto set with its comparators: `to_pandas` has a row for each approach, split and preference."""

    def rows(self) -> list[dict[str, Any]]:
        """Return losses and accuracies of every point of every front."""
        found = []
        for approach in self.answer["approaches"]:
            for split in ("validation", "test"):
                front = approach.get(split, {"rays": []})
                for i, preference in enumerate(front["rays"]):
                    found.append(
                        {
                            "approach": approach["approach"],
                            "split": split,
                            "preference": preference,
                            "losses": front["losses"][i],
                            "accuracies": front["accuracies"][i],
                        }
                    )
        return found

    def plot(self) -> Figure:
        """Return the fronts."""
        from ml2o_dist.paretoset.results import read_fronts
        from ml2o_dist.paretoset.settings import FRONTS
        from ml2o_dist.reporting.pareto_set_plots import fronts_figure

        found = read_fronts(Path(self.run_dir) / FRONTS)
        return fronts_figure(found.approaches, found.tasks)
