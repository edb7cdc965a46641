"""Champions in a real sqlite registry: promoted, rolled back, described, by one process at a time."""

from __future__ import annotations

import getpass
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking.champion import (
    ChampionChanged,
    champion_of,
    describe_version,
    promote_version,
    rollback,
)
from ml2o_dist.tracking.description import CUT, LIMIT
from tests.tracking.filled_registry import Registry
from tests.tracking.rival_promotions import rival_promotions


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(autouse=True)
def no_lock_is_left(registry: Registry) -> Any:
    yield
    assert registry.locks() == []


def test_the_first_champion_has_no_previous_and_says_why_it_is_one(registry: Registry) -> None:
    registry.make_versions("first", 2)
    assert champion_of(registry.uri, "first") is None
    promote_version(registry.uri, "first", 2, expected=None, note="better on 8 of 10")
    assert champion_of(registry.uri, "first") == 2
    assert registry.aliases("first") == {"champion": 2}
    tags = registry.tags("first", 2)
    at = datetime.fromisoformat(tags.pop("promoted_at"))
    assert abs((datetime.now(UTC) - at).total_seconds()) < 60
    assert tags == {
        "promoted_by": f"{getpass.getuser()}@{socket.gethostname()}",
        "promoted_over": "",
        "promotion": "better on 8 of 10",
    }


def test_the_next_champion_keeps_the_one_before_it_as_previous(registry: Registry) -> None:
    registry.make_versions("next", 3)
    for version, expected in ((1, None), (3, 1), (2, 3)):
        promote_version(registry.uri, "next", version, expected=expected, note="")
    assert registry.aliases("next") == {"champion": 2, "previous": 3}
    assert [registry.tags("next", version)["promoted_over"] for version in (1, 2, 3)] == ["", "3", "1"]


@pytest.mark.parametrize("expected", [1, None, 3])
def test_another_champion_than_the_expected_one_is_named_and_nothing_is_written(
    registry: Registry, expected: int | None
) -> None:
    model = f"changed-{expected}"
    registry.make_versions(model, 3)
    promote_version(registry.uri, model, 2, expected=None, note="")
    said = "no version" if expected is None else f"version {expected}"
    with pytest.raises(ChampionChanged, match=rf"'{model}' is version 2.*{said}.*version 3"):
        promote_version(registry.uri, model, 3, expected=expected, note="")
    assert registry.aliases(model) == {"champion": 2}
    assert registry.tags(model, 3) == {}


def test_a_champion_is_not_promoted_again(registry: Registry) -> None:
    registry.make_versions("again", 1)
    promote_version(registry.uri, "again", 1, expected=None, note="once")
    with pytest.raises(UserError, match=r"version 1.*'again'.*champion already"):
        promote_version(registry.uri, "again", 1, expected=1, note="twice")
    assert registry.tags("again", 1)["promotion"] == "once"


def test_why_it_was_forced_is_said_only_where_it_was(registry: Registry) -> None:
    registry.make_versions("forced", 2)
    promote_version(registry.uri, "forced", 1, expected=None, note="")
    promote_version(registry.uri, "forced", 2, expected=1, note="worse", forced="worse on 3 of 10")
    assert "forced" not in registry.tags("forced", 1)
    assert registry.tags("forced", 2)["forced"] == "worse on 3 of 10"
    rollback(registry.uri, "forced")
    promote_version(registry.uri, "forced", 2, expected=1, note="better now")
    assert "forced" not in registry.tags("forced", 2)


def test_an_unknown_model_or_version_is_refused_with_what_there_is(registry: Registry) -> None:
    registry.make_versions("known", 2)
    calls = [
        lambda model, version: promote_version(registry.uri, model, version, expected=None, note=""),
        lambda model, version: describe_version(registry.uri, model, version, "standard", "better"),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"model 'knwn'.*'known'"):
            call("knwn", 1)
        with pytest.raises(UserError, match=r"version.*'known' '7' \(allowed: 1, 2\)"):
            call("known", 7)
    for ask in (champion_of, rollback):
        with pytest.raises(UserError, match=r"model 'knwn'.*'known'"):
            ask(registry.uri, "knwn")


def test_a_store_that_does_not_exist_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown registered model 'ml2o'"):
        promote_version(f"sqlite:///{tmp_path}/mlflow.db", "ml2o", 1, expected=None, note="")
    assert list(tmp_path.iterdir()) == []


def test_a_second_rollback_undoes_the_first(registry: Registry) -> None:
    registry.make_versions("back", 2)
    promote_version(registry.uri, "back", 1, expected=None, note="")
    promote_version(registry.uri, "back", 2, expected=1, note="")
    assert rollback(registry.uri, "back") == (1, 2)
    assert registry.aliases("back") == {"champion": 1, "previous": 2}
    tags = registry.tags("back", 1)
    assert (tags["rolled_back_from"], tags["promoted_over"]) == ("2", "")
    assert abs((datetime.now(UTC) - datetime.fromisoformat(tags["rolled_back_at"])).total_seconds()) < 60
    assert "rolled_back_at" not in registry.tags("back", 2)
    assert rollback(registry.uri, "back") == (2, 1)
    assert registry.aliases("back") == {"champion": 2, "previous": 1}


def test_without_a_champion_or_a_previous_one_nothing_is_rolled_back(registry: Registry) -> None:
    registry.make_versions("bare", 3)
    with pytest.raises(UserError, match=r"model 'bare'.*sqlite.*no champion"):
        rollback(registry.uri, "bare")
    promote_version(registry.uri, "bare", 1, expected=None, note="")
    with pytest.raises(UserError, match=r"no previous champion.*version 1.*none"):
        rollback(registry.uri, "bare")
    promote_version(registry.uri, "bare", 2, expected=1, note="")
    registry.client.delete_model_version("bare", "1")
    with pytest.raises(UserError, match=r"version 2 is the champion.*version 1.*deleted"):
        rollback(registry.uri, "bare")
    promote_version(registry.uri, "bare", 3, expected=2, note="")
    rollback(registry.uri, "bare")
    registry.client.delete_model_version("bare", "3")
    with pytest.raises(UserError, match=r"version 2 is the champion.*version 3.*deleted"):
        rollback(registry.uri, "bare")
    assert registry.aliases("bare") == {"champion": 2}


def test_a_promotion_cut_short_leaves_the_champion_and_can_be_repeated(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.make_versions("cut", 3)
    promote_version(registry.uri, "cut", 1, expected=None, note="")
    promote_version(registry.uri, "cut", 2, expected=1, note="")
    write = MlflowClient.set_registered_model_alias

    def killed(client: MlflowClient, name: str, alias: str, version: str) -> None:
        if alias == "champion":
            raise KeyboardInterrupt
        write(client, name, alias, version)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            promote_version(registry.uri, "cut", 3, expected=2, note="")
    assert registry.aliases("cut") == {"champion": 2, "previous": 2}
    with pytest.raises(UserError, match=r"version 2 is the champion.*alias.*promotion"):
        rollback(registry.uri, "cut")
    promote_version(registry.uri, "cut", 3, expected=2, note="")
    assert registry.aliases("cut") == {"champion": 3, "previous": 2}


def test_a_suites_line_is_replaced_and_the_other_lines_stay(registry: Registry) -> None:
    registry.make_versions("described", 1)
    describe_version(registry.uri, "described", 1, "standard", "better on 8 of 10")
    describe_version(registry.uri, "described", 1, "standard-long", "worse\non 1 of 3")
    describe_version(registry.uri, "described", 1, "standard", "standard: better on 9 of 10")
    text = registry.client.get_model_version("described", "1").description
    assert text.splitlines() == ["trained 1", "standard: better on 9 of 10", "standard-long: worse on 1 of 3"]
    assert registry.tags("described", 1) == {
        "suite.standard": "better on 9 of 10",
        "suite.standard-long": "worse on 1 of 3",
    }


def test_of_a_long_description_what_training_said_is_cut(registry: Registry) -> None:
    registry.make_versions("long", 1)
    rows = [f"| problem {i} | {'x' * 90} |" for i in range(48)]
    registry.client.update_model_version("long", "1", description="\n".join(rows))
    for suite in ("one", "two", "three"):
        describe_version(registry.uri, "long", 1, suite, suite + " 123456789" * 20)
    text = registry.client.get_model_version("long", "1").description
    assert LIMIT - 120 < len(text) <= LIMIT
    lines = text.splitlines()
    assert lines[-3:] == [f"{suite}: {suite}{' 123456789' * 20}" for suite in ("one", "two", "three")]
    assert lines.count(CUT) == 1
    kept = lines.index(CUT)
    assert lines[: kept - 1] == rows[: kept - 1]
    assert rows[kept - 1].startswith(lines[kept - 1])


def test_of_promotions_at_one_time_one_is_made_and_the_others_learn_of_it(registry: Registry) -> None:
    registry.make_versions("raced", 4)
    rival_promotions(registry, "raced", processes=3, rounds=4)
