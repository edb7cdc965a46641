"""What is said of an address before Ray is asked, and what a Ray of our own could have."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace

import pytest
import ray

from ml2o_dist.metatrain.capacity import check_capacity
from ml2o_dist.runtime import cluster as cluster_connection
from ml2o_dist.runtime.cluster import connected, one_start_at_a_time, own_capacity
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.ray_internals import TESTED, check_has, ray_internal
from tests.wording import says


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was asked for"))
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # of the session's cluster, which other tests use


@pytest.fixture(params=[b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b""])
def stranger(request):
    """The address of a server that answers to anything with these bytes, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            link, _ = server.accept()
            with link:
                link.recv(100)
                link.sendall(request.param)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(10)


def test_another_server_at_the_address_is_said_at_once(no_ray, stranger):
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"^--address '{stranger}'.*no Ray cluster"):
        connected(stranger).__enter__()
    assert time.monotonic() - began < cluster_connection.PROBE_S


def test_a_server_that_says_nothing_is_waited_for_some_seconds_only(no_ray, monkeypatch):
    monkeypatch.setattr(cluster_connection, "PROBE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=r"no Ray cluster.*timed out"):
            connected(address).__enter__()


@pytest.mark.parametrize("times", [1, 2])
def test_a_ray_that_does_not_come_up_is_started_once_more_and_then_is_one_line(no_ray, monkeypatch, caplog, times):
    failures = [Exception("The current node timed out during startup.\nThis could happen ...") for _ in range(times)]

    def init(**options):
        if failures:
            raise failures.pop()
        return SimpleNamespace(address_info={"address": "127.0.0.1:1"})

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    if times == 1:
        with connected("local") as line:
            assert line == "127.0.0.1:1: 2 CPU, 0 GPU"
    else:
        with pytest.raises(UserError, match=r"^Ray did not start.*twice.*The current node timed"):
            connected("local").__enter__()
    assert len(re.findall(r"Ray did not start.*The current node timed out during startup.*once more", caplog.text)) == 1


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("address", ["auto", "local"])
def test_a_temporary_folder_that_is_too_long_for_sockets_is_said_before_ray_is_started(
    no_ray, monkeypatch, tmp_path, variable, address
):
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    monkeypatch.setattr(cluster_connection, "_running_here", lambda: False)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(folder))
    with pytest.raises(UserError) as refused:
        connected(address).__enter__()
    most = 107 - len(f"/ray/session_2026-11-30_11-26-46_123456_{os.getpid()}/sockets/plasma_store")
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith(f"{variable}={folder} ")
    assert says(line, "too long", f"{len(str(folder))} bytes", f"at most {most}", "107", "RAY_TMPDIR", "/tmp")


def test_what_a_release_of_ray_has_changed_is_said_with_those_that_are_tested():
    with pytest.raises(UserError) as said, ray_internal("ray._private.nothing"):
        from ray._private import nothing  # noqa: F401
    line = str(said.value)
    assert says(line, f"Ray {ray.__version__}", "ray._private.nothing")
    assert line.endswith(f"pip install 'ray=={TESTED}'")
    with pytest.raises(UserError, match=r"has changed RemoteFunction\.of_before"):
        check_has(ray.remote_function.RemoteFunction, "_remote", "of_before")


def test_the_longest_temporary_folder_that_is_let_pass_is_long_enough_for_ray(monkeypatch):
    """Ray's own check of the sockets' paths is the oracle."""
    from ray._private.utils import validate_socket_filepath

    below = f"/ray/session_2026-11-30_11-26-46_123456_{os.getpid()}/sockets/plasma_store"
    for length, passes in ((107 - len(below), True), (108 - len(below), False)):
        folder = "/" + "x" * (length - 1)
        monkeypatch.setenv("RAY_TMPDIR", folder)
        if passes:
            cluster_connection._check_temporary_folder()
            validate_socket_filepath(folder + below)
            continue
        with pytest.raises(UserError):
            cluster_connection._check_temporary_folder()
        with pytest.raises(OSError, match="cannot exceed 107 bytes"):
            validate_socket_filepath(folder + below)


def test_a_real_cluster_passes(cluster):
    cluster_connection._check_answers(ray.get_runtime_context().gcs_address, "--address")


def test_a_ray_of_our_own_has_at_most_the_cpus_of_this_machine(no_ray, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster_connection, "_running_here", lambda: False)
    here = {"CPU": float(os.cpu_count())}
    assert own_capacity("auto") == own_capacity("local") == here
    assert own_capacity("10.0.0.1:6379") == {}
    monkeypatch.setattr(cluster_connection, "_running_here", lambda: True)  # `ray start`
    assert (own_capacity("auto"), own_capacity("local")) == ({}, here)
    monkeypatch.setattr(cluster_connection, "_running_here", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert (own_capacity("auto"), own_capacity("local")) == ({}, here)
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 99}')
    assert own_capacity("local") == {}
    monkeypatch.delenv("RAY_OVERRIDE_RESOURCES")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    assert own_capacity("local") == {}


def test_what_is_not_known_is_not_refused():
    from ml2o_dist.config import ResourceSettings

    check_capacity(99, ResourceSettings(num_gpus=1), {}, "this machine")
    check_capacity(4, ResourceSettings(num_cpus=0.5), {"CPU": 2.0}, "this machine")
    with pytest.raises(UserError, match=r"workers=5 needs 2\.5 CPU \(0\.5 each\).*this machine has 2: 0\.5 missing"):
        check_capacity(5, ResourceSettings(num_cpus=0.5), {"CPU": 2.0}, "this machine")


def test_rays_start_one_after_the_other(tmp_path):
    begun = tmp_path / "begun"
    code = (
        "import sys; from pathlib import Path; from ml2o_dist.runtime.cluster import one_start_at_a_time as alone\n"
        "print('here', flush=True)\nwith alone(): Path(sys.argv[1]).touch()"
    )
    with one_start_at_a_time():
        other = subprocess.Popen([sys.executable, "-c", code, begun], stdout=subprocess.PIPE)
        assert other.stdout.readline() == b"here\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=0.5)
        assert not begun.exists()
    other.communicate(timeout=30)
    assert begun.exists()


def test_the_lock_of_a_start_is_no_link_that_another_user_has_left(tmp_path, monkeypatch):
    """Its name in a folder that all users share is known to all of them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "precious").write_text("precious")
    folder = tmp_path / f"ml2o-{os.getuid()}"
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"cannot hold the lock.*TMPDIR"), one_start_at_a_time():
        pytest.fail("it was opened")
    folder.unlink()
    with one_start_at_a_time():
        (lock,) = folder.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    lock.unlink()
    lock.symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot hold the lock"), one_start_at_a_time():
        pytest.fail("it was opened")
    lock.unlink()
    folder.chmod(0o777)
    with pytest.raises(UserError, match=r"others may write.*TMPDIR"), one_start_at_a_time():
        pytest.fail("it was opened")
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, "precious"]


def test_a_lock_that_cannot_be_had_is_one_line_of_its_own(no_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"ml2o-{os.getuid()}").write_text("a file")
    with pytest.raises(UserError, match=r"^'.*' cannot hold the lock"), connected("local"):
        pytest.fail("Ray was started")
