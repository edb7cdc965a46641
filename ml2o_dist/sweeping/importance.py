"""Importance of search space keys: how much the scores of a sweep's trials depend on each."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np

from ml2o_dist.sweeping.record import SweepRecord, Trial
from ml2o_dist.sweeping.settings import Distribution, SweepSettings

FEWEST = 10
"""Minimum number of trials: out-of-bag estimates of fewer are noise (each tree leaves out about a third)."""

TREES, REPEATS = 100, 30


@dataclass(frozen=True)
class Importance:
    """The importance of one key.

    Attributes:
        loss: the drop of the forest's R^2 when the key's values are shuffled among the trials.
        spread: standard deviation of that drop over the shuffles.
    """

    key: str
    loss: float
    spread: float


@dataclass(frozen=True)
class Importances:
    """Permutation importances of a random forest (Breiman 2001) that was fitted to the ranks of the trials' scores.

    Ranks are used because a diverged trial would dominate raw scores. The importances hold for these trials, not for
    other regions of the space; if two keys only matter together, both get the importance.

    Attributes:
        by_key: the most important first; empty if there are too few trials.
        trials: the number of trials used: all with a finite score.
        out_of_bag: R^2 of the forest on trials that a tree did not see; at or below 0 it has learned nothing, and the
            importances mean nothing.
    """

    by_key: tuple[Importance, ...]
    trials: int
    out_of_bag: float

    @property
    def caption(self) -> str:
        """Sentences that explain the figures and whether they are meaningful."""
        if not self.by_key:
            return f"Not measured: it takes {FEWEST} trials with finite, different scores; {self.trials} are there."
        said = (
            "By how much a random forest's R^2 on the ranks of the scores falls when a key's values are shuffled among "
            f"the {self.trials} trials. On trials that its trees did not see, its R^2 is {self.out_of_bag:.2f}"
        )
        if self.out_of_bag <= 0:
            return f"{said}: it has learned nothing, and these bars mean nothing. More trials may help."
        return f"{said} (1: it knows all, 0: nothing; below about 0.3 trust no order)."


def importance(settings: SweepSettings, record: SweepRecord) -> Importances:
    """Return the importance of each key of the space; the same for the same trials."""
    trials = [trial for trial in record.in_order if math.isfinite(trial.score)]
    scores = np.array([trial.score for trial in trials])
    if len(trials) < FEWEST or len(set(scores)) < 2:
        return Importances((), len(trials), math.nan)
    from scipy.stats import rankdata
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    columns, ranks = encoded(settings, trials), rankdata(scores)
    forest = RandomForestRegressor(TREES, oob_score=True, min_samples_leaf=2, random_state=0).fit(columns, ranks)
    found = permutation_importance(forest, columns, ranks, n_repeats=REPEATS, random_state=0)
    pairs = zip(settings.space, found.importances_mean, found.importances_std, strict=True)
    by_key = sorted((Importance(key, float(m), float(s)) for key, m, s in pairs), key=lambda each: -each.loss)
    return Importances(tuple(by_key), len(trials), float(forest.oob_score_))


def encoded(settings: SweepSettings, trials: list[Trial]) -> np.ndarray:
    """Return the trials' values as numbers, [trials, keys]: see `as_number`."""
    return np.array(
        [[as_number(each, trial.values[key]) for key, each in settings.space.items()] for trial in trials], dtype=float
    )


def as_number(distribution: Distribution, value: object) -> float:
    """Return a value as a number: its index in a list, the logarithm of a log-uniform value, else the value."""
    if distribution.interval is None:
        texts = [json.dumps(each, sort_keys=True) for each in distribution.values]
        return float(texts.index(json.dumps(value, sort_keys=True)))
    assert isinstance(value, int | float)
    return math.log10(value) if distribution.logarithmic else float(value)
