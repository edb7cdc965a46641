"""The lock of a model: held by one, waited for by others, broken only where its owner must be dead."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking import promotion_lock as locks
from ml2o_dist.tracking.champion import champion_of, promote_version
from ml2o_dist.tracking.promotion_lock import LockLost, promotion_lock
from ml2o_dist.tracking.registry import list_versions, register_version
from tests.tracking.filled_registry import Registry
from tests.tracking.quick_processes import quick_processes
from tests.wording import says


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(tmp_path_factory.mktemp("registry"))
    registry.make_versions("ml2o", 40)
    return registry


@pytest.fixture
def promote(registry: Registry) -> Callable[[], None]:
    """Promotes the next version."""

    def promote() -> None:
        champion = champion_of(registry.uri, "ml2o")
        promote_version(registry.uri, "ml2o", (champion or 0) + 1, expected=champion, note="")

    return promote


@pytest.fixture
def quick_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_STALE_AFTER_S", 0.3)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, quick_to_look: None) -> None:
    """For tests that are refused; who takes over a lock has the time that it has in use."""
    monkeypatch.setattr(locks, "WAIT_S", 1.0)


@contextmanager
def another_holder(registry: Registry) -> Iterator[BaseProcess]:
    """A process that holds the lock until it is signalled."""
    context = quick_processes()
    held = context.Event()
    process = context.Process(target=_hold, args=(registry.uri, held))
    process.start()
    try:
        assert held.wait(120)
        yield process
    finally:
        process.kill()
        process.join()


def _hold(uri: str, held: Event) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    with promotion_lock(uri, "ml2o"):
        held.set()
        time.sleep(600)


def leave_a_lock(registry: Registry, name: str) -> None:
    """Make the lock that a killed process leaves."""
    lock = promotion_lock(registry.uri, name.removesuffix(".lock"))
    lock.__enter__()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(locks, "_release", lambda client, name, token: None)
        lock.__exit__(None, None, None)


def send(process: BaseProcess, number: int) -> None:
    """Signal it, and wait for its end."""
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode not in (None, 0)


def test_a_lock_that_is_alive_is_waited_for_and_not_broken_and_one_of_a_killed_process_is(
    registry: Registry, promote: Callable[[], None], impatient: None
) -> None:
    with another_holder(registry) as process:
        start = time.monotonic()
        with pytest.raises(UserError) as refusal:
            promote()
        assert 1 <= time.monotonic() - start < 5
        said = rf"the lock 'ml2o\.lock' at sqlite\S+ is held by \S+@\S+, process {process.pid} since 20\d\d-\S+, wai"
        assert re.match(said, str(refusal.value))
        registry.make_older("ml2o.lock", 50)
        with pytest.raises(UserError, match="is held by"):
            promote()
        send(process, signal.SIGKILL)
    with pytest.raises(UserError, match="is held by"):
        promote()
    before = champion_of(registry.uri, "ml2o")
    registry.make_older("ml2o.lock", 15)
    promote()
    assert champion_of(registry.uri, "ml2o") == (before or 0) + 1
    assert registry.locks() == []


def test_the_line_that_removes_it_by_hand_does(
    registry: Registry, promote: Callable[[], None], impatient: None
) -> None:
    leave_a_lock(registry, "ml2o.lock")
    with pytest.raises(UserError, match="is held by") as refusal, promotion_lock(registry.uri, "ml2o"):
        pass
    command = re.search(r'python -c "(.*)"$', str(refusal.value))
    assert command is not None
    exec(command[1], {})
    assert registry.locks() == []


def test_a_process_that_ends_on_ctrl_c_releases_it(registry: Registry) -> None:
    with another_holder(registry) as process:
        assert registry.locks() == ["ml2o.lock"]
        send(process, signal.SIGINT)
    assert registry.locks() == []


@pytest.mark.parametrize("end", [KeyboardInterrupt, UserError, KeyError])
def test_a_block_that_raises_releases_it_and_what_it_raised_goes_on(
    registry: Registry, end: type[BaseException]
) -> None:
    with pytest.raises(end), promotion_lock(registry.uri, "ml2o"):
        raise end("in the block")
    assert registry.locks() == []


def test_whoever_was_stopped_while_holding_it_writes_nothing(
    registry: Registry, promote: Callable[[], None], quick_to_look: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after it read the champion, for longer than a lock is held; others break the lock and promote."""
    champion = champion_of(registry.uri, "ml2o") or 0
    ask = locks.PromotionLock.confirm

    def stopped(lock: locks.PromotionLock) -> None:
        monkeypatch.setattr(locks.PromotionLock, "confirm", ask)
        registry.make_older("ml2o.lock", 61)
        promote()
        ask(lock)

    monkeypatch.setattr(locks.PromotionLock, "confirm", stopped)
    with pytest.raises(LockLost, match=r"lock 'ml2o\.lock'.*broken.* 60 s"):
        promote_version(registry.uri, "ml2o", champion + 2, expected=champion or None, note="late")
    assert champion_of(registry.uri, "ml2o") == champion + 1
    assert registry.tags("ml2o", champion + 2) == {}
    assert registry.locks() == []


def test_a_breaker_that_was_killed_is_no_obstacle(
    registry: Registry, promote: Callable[[], None], quick_to_look: None
) -> None:
    for name in ("ml2o.lock", "ml2o.lock.lock"):
        leave_a_lock(registry, name)
        registry.make_older(name, 61)
    promote()
    assert registry.locks() == []


def test_a_lock_released_between_two_looks_is_taken(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow looks at what exists in order to say that it does, and it may be gone by then."""
    create, refusals = MlflowClient.create_registered_model, ["RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"]

    def quicker(client: MlflowClient, *words: Any, **named: Any) -> Any:
        if refusals:
            error = MlflowException("as the store does")
            error.error_code = refusals.pop()
            raise error
        return create(client, *words, **named)

    monkeypatch.setattr(MlflowClient, "create_registered_model", quicker)
    with promotion_lock(registry.uri, "ml2o") as lock:
        lock.confirm()
    assert registry.locks() == []


def test_a_lock_whose_creation_was_not_answered_is_known_again(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow sends a request again where the answer was lost; the second one is told that the name exists."""
    create = MlflowClient.create_registered_model

    def twice(client: MlflowClient, *words: Any, **named: Any) -> Any:
        create(client, *words, **named)
        return create(client, *words, **named)

    monkeypatch.setattr(MlflowClient, "create_registered_model", twice)
    with promotion_lock(registry.uri, "ml2o") as lock:
        lock.confirm()
    assert registry.locks() == []


def test_a_store_that_fails_at_the_release_costs_a_warning(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(client: MlflowClient, name: str) -> None:
        raise MlflowException("no answer")

    with monkeypatch.context() as patched, promotion_lock(registry.uri, "ml2o"):
        patched.setattr(MlflowClient, "delete_registered_model", away)
        # undone at the end of the outer block, which is after the release
    assert says(caplog.text, "'ml2o.lock'", "not released")
    registry.client.delete_registered_model("ml2o.lock")


def test_a_lock_is_no_model_to_a_reader_and_a_model_no_lock(registry: Registry, tmp_path: Path) -> None:
    with promotion_lock(registry.uri, "ml2o"):
        assert registry.locks() == ["ml2o.lock"]
        assert {entry["name"] for entry in list_versions(registry.uri)} == {"ml2o"}
        with pytest.raises(UserError, match=r"model 'ml2o\.lock'.*'ml2o'"):
            champion_of(registry.uri, "ml2o.lock")
    with pytest.raises(UserError, match=r"model 'ml2o\.lock'.*end in \.lock"):
        register_version(registry.uri, "ml2o.lock", registry.artifact(1))
    registry.client.create_registered_model("other.lock")
    with pytest.raises(UserError, match=r"'other\.lock' is no lock"):
        promotion_lock(registry.uri, "other").__enter__()
    registry.client.delete_registered_model("other.lock")


def test_a_server_that_is_away_is_an_error_in_seconds() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 does not answer.*refused"):
        promotion_lock("http://127.0.0.1:9", "ml2o").__enter__()
    assert time.monotonic() - start < 10
