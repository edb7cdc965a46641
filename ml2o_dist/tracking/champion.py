"""The champion version of a model: promote it, roll it back, and record the figures that decided.

A model has three aliases: `candidate`, its newest version; `champion`, the one that was promoted; `previous`, the
champion before it. A process that writes the latter two holds the model's lock (`promotion_lock`). Of concurrent
promotions one is therefore first, and every other one finds that the champion is not the one it was compared with.

The deciding figures are written before the aliases, and `previous` before `champion`. A promotion that is killed
half-way leaves the old champion and can be repeated against it, and no champion is without its figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.names import mlflow_key
from ml2o_dist.tracking.description import with_suite_line
from ml2o_dist.tracking.promotion_lock import PromotionLock, promotion_lock, this_user
from ml2o_dist.tracking.registry import CHAMPION, PREVIOUS, ModelVersion, model_versions
from ml2o_dist.tracking.store import answering, connect, redacted

_SUITE = "suite."


class ChampionChanged(UserError):
    """The champion is no longer the version that the candidate was compared with, so the comparison is void."""


def champion_of(uri: str, model: str) -> int | None:
    """Return the champion version of `model`; None if it has none.

    Raises:
        UserError: there is no such model, or a store that does not answer.
    """
    return _holding(model_versions(uri, model), CHAMPION)


def promote_version(uri: str, model: str, version: int, *, expected: int | None, note: str, forced: str = "") -> None:
    """Make `version` the champion of `model`; the old champion, if there is one, becomes `previous`.

    The version is tagged with `promoted_at` (UTC), `promoted_by` (user@host), `promoted_over` (the old champion, or
    ""), `promotion` and, only if it was forced, `forced`.

    Args:
        expected: the champion that the version was compared with; None if there was none.
        note: the figures that decided.
        forced: why the gate would have refused the version; "" if it passed.

    Raises:
        ChampionChanged: another version is champion by now.
        UserError: an unknown model or version, one that is champion already, a lock that is not to be had, or a store
            that does not answer.
    """
    with _locked(uri, model) as (lock, client, versions):
        promoted = _numbered(versions, version)
        champion = _holding(versions, CHAMPION)
        if champion != expected:
            raise ChampionChanged(
                f"the champion of model {model!r} is {_named(champion)}, no longer {_named(expected)}, which version "
                f"{version} was compared with: compare it again"
            )
        if champion == version:
            raise UserError(f"version {version} of model {model!r} is its champion already")
        tags = {
            "promoted_at": _now(),
            "promoted_by": this_user(),
            "promoted_over": "" if champion is None else str(champion),
            "promotion": note,
        }
        lock.confirm()
        _tag(client, model, version, tags | ({"forced": forced} if forced else {}))
        if not forced and "forced" in promoted["tags"]:  # from an earlier promotion
            client.delete_model_version_tag(model, str(version), "forced")
        lock.confirm()
        if champion is not None:
            client.set_registered_model_alias(model, PREVIOUS, str(champion))
        client.set_registered_model_alias(model, CHAMPION, str(version))


def rollback(uri: str, model: str) -> tuple[int, int]:
    """Swap the champion of `model` and its `previous`; return both new versions, the champion first.

    A second rollback undoes the first. The new champion is tagged with `rolled_back_at` (UTC), `rolled_back_from` (the
    old one's version) and `rolled_back_by` (user@host).

    Raises:
        UserError: there is no such model, it has no champion, its previous one is missing or deleted, the lock cannot
            be acquired, or the store does not answer.
    """
    with _locked(uri, model) as (lock, client, versions):
        champion, previous = _holding(versions, CHAMPION), _holding(versions, PREVIOUS)
        if champion is None:
            raise UserError(f"model {model!r} at {redacted(uri)} has no {CHAMPION}: there is nothing to roll back")
        if previous is None or previous == champion:
            raise _no_previous(uri, versions, _numbered(versions, champion), previous)
        lock.confirm()
        tags = {"rolled_back_at": _now(), "rolled_back_from": str(champion), "rolled_back_by": this_user()}
        _tag(client, model, previous, tags)
        lock.confirm()
        client.set_registered_model_alias(model, CHAMPION, str(previous))
        client.set_registered_model_alias(model, PREVIOUS, str(champion))
    return previous, champion


def describe_version(uri: str, model: str, version: int, suite: str, line: str) -> None:
    """Write a version's result on a suite of problems into its description and its tag `suite.<suite>`.

    In the description the line that begins with `<suite>: ` is replaced, or one is added; the others stay.

    Args:
        line: the result, with or without `<suite>: ` before it.

    Raises:
        UserError: an unknown model or version, a lock that is not to be had, or a store that does not answer or
            refuses.
    """
    said = " ".join(line.split()).removeprefix(f"{suite}: ")
    with _locked(uri, model) as (lock, client, versions):
        found = _numbered(versions, version)
        suites = [key.removeprefix(_SUITE) for key in found["tags"] if key.startswith(_SUITE)]
        text = with_suite_line(found["description"], suite, said, suites)
        lock.confirm()
        client.update_model_version(model, str(version), description=text)
        _tag(client, model, version, {mlflow_key(_SUITE + suite): said})


@contextmanager
def _locked(uri: str, model: str) -> Iterator[tuple[PromotionLock, Any, list[ModelVersion]]]:
    """Hold the model's lock; yield the lock, a client, and the model's versions, read under the lock."""
    model_versions(uri, model)  # for a model that does not exist, take no lock and create no store
    with promotion_lock(uri, model) as lock, answering(uri):
        yield lock, connect(uri), model_versions(uri, model)


def _numbered(versions: list[ModelVersion], number: int) -> ModelVersion:
    for entry in versions:
        if entry["version"] == number:
            return entry
    numbers = [str(entry["version"]) for entry in versions]
    raise unknown(f"version of model {versions[0]['name']!r}", str(number), numbers)


def _holding(versions: list[ModelVersion], alias: str) -> int | None:
    return next((entry["version"] for entry in versions if alias in entry["aliases"]), None)


def _tag(client: Any, model: str, version: int, tags: dict[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(model, str(version), key, value)


def _no_previous(uri: str, versions: list[ModelVersion], champion: ModelVersion, previous: int | None) -> UserError:
    numbers = [entry["version"] for entry in versions]
    said = [champion["tags"].get(key, "") for key in ("rolled_back_from", "promoted_over")]
    before = [int(text) for text in said if re.fullmatch(r"\d{1,18}", text)]
    deleted = [number for number in before if number not in numbers]
    if previous is not None:
        why = "so is its alias, after a promotion or rollback that was cut short"
    elif deleted:
        why = f"and version {deleted[0]}, the champion before it, was deleted"
    else:
        why = "and none was before it"
    return UserError(
        f"model {champion['name']!r} at {redacted(uri)} has no {PREVIOUS} {CHAMPION} to roll back to: version "
        f"{champion['version']} is the {CHAMPION}, {why}"
    )


def _named(champion: int | None) -> str:
    return "no version" if champion is None else f"version {champion}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
