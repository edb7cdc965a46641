"""How trials are drawn, stopped early and exchanged: a sweep's settings as objects of Ray Tune."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

from ml2o_dist.errors import UserError
from ml2o_dist.sweeping.population import LockstepPbt, Recorded
from ml2o_dist.sweeping.settings import Distribution, SweepSettings
from ml2o_dist.sweeping.space import as_sampled
from ml2o_dist.sweeping.trial import SCORE, TIME


def tune_config(settings: SweepSettings, recorded: Recorded) -> Any:
    """Return Tune's configuration; `recorded` tells a scheduler of a sweep that is gone on with what was before.

    Raises:
        UserError: search=optuna, which is not installed.
    """
    np.random.seed(settings.seed % 2**32)  # what ASHA's brackets are drawn from
    return tune.TuneConfig(
        metric=SCORE,
        mode="min",
        num_samples=1 if settings.search == "grid" else settings.count,
        search_alg=_search(settings),
        scheduler=_scheduler(settings, recorded),
        trial_name_creator=_name,
        trial_dirname_creator=_name,
    )


def param_space(settings: SweepSettings) -> dict[str, Any]:
    """Return the search space as Tune has it, by dotted key."""
    if settings.search == "grid":
        return {
            key: tune.grid_search([as_sampled(each, value) for value in each.values])
            for key, each in settings.space.items()
        }
    return {key: _domain(each) for key, each in settings.space.items()}


def check_search(settings: SweepSettings) -> None:
    """Raise UserError where what searches is not installed."""
    if settings.search == "optuna":
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise UserError(
                "search=optuna needs optuna: pip install 'ml2o-dist[sweep]', from a checkout pip install -e '.[sweep]'"
            ) from None


def _search(settings: SweepSettings) -> Any:
    check_search(settings)
    if settings.search != "optuna":
        return BasicVariantGenerator(max_concurrent=settings.max_concurrent, random_state=settings.seed)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = OptunaSearch(sampler=optuna.samplers.TPESampler(seed=settings.seed))
    return ConcurrencyLimiter(search, settings.max_concurrent) if settings.max_concurrent else search


def _scheduler(settings: SweepSettings, recorded: Recorded) -> Any:
    every = settings.meta_train.validation.every
    if settings.scheduler == "asha":
        return RememberingAsha(
            recorded,
            time_attr=TIME,
            max_t=longest(settings),
            grace_period=settings.asha.grace or every,
            reduction_factor=settings.asha.reduction,
        )
    if settings.scheduler == "pbt":
        return LockstepPbt(
            recorded,
            settings.seed,
            time_attr=TIME,
            perturbation_interval=settings.pbt.interval or every,
            hyperparam_mutations={
                key: [as_sampled(each, value) for value in each.values] if each.interval is None else _domain(each)
                for key, each in settings.space.items()
            },
            quantile_fraction=settings.pbt.quantile,
            resample_probability=settings.pbt.resample,
            custom_explore_fn=partial(_inside, settings.space),
        )
    return FIFOScheduler()


def longest(settings: SweepSettings) -> int:
    """Return the most meta-steps that a trial may have."""
    swept = settings.space.get("meta_steps")
    return max(swept.values) if swept else settings.meta_train.meta_steps


class RememberingAsha(ASHAScheduler):  # type: ignore[misc]  # Ray is not followed
    """ASHA that knows, in a sweep that is gone on with, what its trials have reported: Tune does not save its rungs."""

    def __init__(self, recorded: Recorded, **settings: Any) -> None:
        super().__init__(**settings)
        self._recorded = recorded

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Put the trial's reports into their rungs again."""
        super().on_trial_add(tune_controller, trial)
        bracket = self._trial_info[trial.trial_id]
        for step, score in self._recorded(trial.trial_id):
            bracket.on_result(trial, step, -score)


def _inside(space: Mapping[str, Distribution], sampled: dict[str, Any]) -> dict[str, Any]:
    """Bring values that PBT has changed by a factor back into their intervals."""
    for key, each in space.items():
        if each.interval is not None:
            low, high = each.interval
            sampled[key] = min(max(sampled[key], low), high)
            if each.whole:
                sampled[key] = round(sampled[key])
    return sampled


def _domain(each: Distribution) -> Any:
    if each.interval is None:
        return tune.choice([as_sampled(each, value) for value in each.values])
    low, high = each.interval
    draw = getattr(tune, each.kind)
    return draw(int(low), int(high) + 1) if each.whole else draw(low, high)


def _name(trial: Any) -> str:
    return str(trial.trial_id)
