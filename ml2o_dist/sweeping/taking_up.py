"""Resume the trials of an earlier process from `trials.jsonl` and the checkpoints, nothing else.

Ray Tune pickles its own state of a sweep, and unpickling a file can run code in it, so that state is never read. The
record has the same information: every report and every copy, in the order of arrival.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ml2o_dist.metatrain.checkpoint import CheckpointError, load_checkpoint
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.reading import lies_within
from ml2o_dist.sweeping.record import FOLDER, SweepRecord, Trial
from ml2o_dist.sweeping.search import asha, result
from ml2o_dist.sweeping.settings import Distribution, SweepSettings
from ml2o_dist.sweeping.space import trial_settings
from ml2o_dist.sweeping.trial import SCORE
from ml2o_dist.sweeping.trial_source import Earlier, drawn_number

_CHECKPOINT = re.compile(r"checkpoint_(\d{6,12})")

log = logging.getLogger(__name__)


def take_up(settings: SweepSettings, folder: Path, record: SweepRecord) -> list[Earlier]:
    """Return the trials on record; each unfinished trial is rewound to its newest intact checkpoint.

    The record is corrected first. A trial is marked as ended if its last report was at its last meta-step or made the
    scheduler stop it. Reports after the checkpoint that a trial resumes from are dropped; the trial makes them again.

    Raises:
        UserError: the record is not of this sweep.
    """
    _check_belongs(settings, record)
    _note_ends(settings, record)
    return [_taken_up(settings, folder, record, trial) for trial in record.in_order]


def checkpoint_of(folder: Path, trial: Trial) -> Path:
    """Return the checkpoint of a trial's last report in a sweep's `folder`, or the newest one if that is missing."""
    paths = [path for _, path in _checkpoints(folder, trial.id)] or [folder / trial.folder / "checkpoint_000000"]
    for path in paths:
        with suppress(CheckpointError):
            if load_checkpoint(path).meta_step == trial.meta_steps:
                return path
    return paths[0]


def _check_belongs(settings: SweepSettings, record: SweepRecord) -> None:
    """Raise UserError unless every trial on record can be one of the sweep's."""
    if len(record.trials) > settings.count:
        raise _foreign(record, f"it has {len(record.trials)} trials, the sweep {settings.count}")
    for trial in record.trials.values():
        number = drawn_number(trial.id)
        if settings.search != "optuna" and not 0 <= number < settings.count:
            raise _foreign(record, f"trial {trial.id!r} is none of trials 0 to {settings.count - 1}")
        for values in (trial.values, *(report.values for report in trial.reports.values())):
            if values.keys() != settings.space.keys():
                raise _foreign(record, f"trial {trial.number} has values for {', '.join(sorted(values)) or 'no key'}")
            for key, value in values.items():
                if not _lies_in(settings.space[key], value):
                    raise _foreign(record, f"trial {trial.number} has {key}={json.dumps(value)[:60]}")
    numbers = [drawn_number(id) for id in record.trials]
    if settings.search != "optuna" and len(set(numbers)) < len(numbers):
        raise _foreign(record, "two of its trials are the same one")


def _foreign(record: SweepRecord, why: str) -> UserError:
    return UserError(f"{record.file} is not of this sweep: {why}; begin another one in a new --run-dir")


def _lies_in(distribution: Distribution, value: Any) -> bool:
    if distribution.interval is None:
        return any(_text(value) == _text(each) for each in distribution.values)
    kinds = int if distribution.whole else (int, float)
    low, high = distribution.interval
    return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _note_ends(settings: SweepSettings, record: SweepRecord) -> None:
    """Record the end of trials that had finished or been stopped when a kill kept that from being recorded."""
    stopped = _stopped(settings, record)
    for trial in record.trials.values():
        if trial.state == "running" and trial.reports:
            if trial.meta_steps >= trial_settings(settings, trial.values).meta_steps:
                record.end(trial.id, "finished")
            elif trial.id in stopped:
                record.end(trial.id, "stopped")


def _stopped(settings: SweepSettings, record: SweepRecord) -> set[str]:
    """Return the trials that ASHA stopped at their last report, found by replaying all reports to it."""
    if settings.scheduler != "asha":
        return set()
    scheduler = asha(settings, {})
    scheduler.set_search_properties(SCORE, "min")
    trials: dict[str, Any] = {}
    stopped: dict[str, bool] = {}
    for id, step in record.in_time:
        if id not in trials:
            trials[id] = SimpleNamespace(trial_id=id)
            scheduler.on_trial_add(None, trials[id])
        decision = scheduler.on_trial_result(None, trials[id], result(step, record.trials[id].reports[step].validation))
        stopped[id] = decision == scheduler.STOP
    return {id for id, last in stopped.items() if last}


def _taken_up(settings: SweepSettings, folder: Path, record: SweepRecord, trial: Trial) -> Earlier:
    ended = trial.state in ("finished", "stopped")
    newest = next((number for number, _ in _checkpoints(folder, trial.id)), -1)
    found = None
    if not ended:
        found = _copied(folder, trial) or _newest_whole(folder, trial.id, trial.meta_steps if trial.reports else -1)
        record.rewind(trial.id, found[1] if found else -1)
    return Earlier(
        trial.id,
        dict(trial.values),
        ended,
        {step: report.validation for step, report in sorted(trial.reports.items())},
        found[0] if found else None,
        found[1] if found else -1,
        newest,
    )


def _copied(folder: Path, trial: Trial) -> tuple[Path, int] | None:
    """Return the other trial's checkpoint that this trial was given after its last report; None if not intact."""
    if trial.copied is None:
        return None
    found = _newest_whole(folder, trial.copied.source, trial.copied.at)
    if found is None or found[1] != trial.copied.at:
        log.warning("trial %d goes on from its own weights: those that it was given are not there", trial.number)
        return None
    return found


def _newest_whole(folder: Path, id: str, last: int) -> tuple[Path, int] | None:
    """Return a trial's newest intact checkpoint of meta-step `last` or before, and its meta-step."""
    for _, path in _checkpoints(folder, id):
        try:
            step = load_checkpoint(path).meta_step
        except CheckpointError as error:
            log.warning("checkpoint refused: %s", error)
            continue
        if isinstance(step, int) and 0 <= step <= last:
            return path, step
    return None


def _checkpoints(folder: Path, id: str) -> Iterator[tuple[int, Path]]:
    """Yield number and folder of a trial's checkpoints, the newest first; links out of the sweep are not followed."""
    own = folder / FOLDER / id
    found = [(int(name[1]), path) for path in own.glob("checkpoint_*") if (name := _CHECKPOINT.fullmatch(path.name))]
    yield from sorted((each for each in found if lies_within(each[1], folder)), reverse=True)
