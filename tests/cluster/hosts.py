"""Hosts on a network of their own: namespaces of this machine's kernel, joined by a bridge.

A host has its own network, processes, name, /tmp/ray, /dev/shm, /home and /etc/hosts; the rest of the file system is
this machine's. So the commands of cluster/ run as they are, `ray stop` too, which elsewhere ends every Ray there is.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PREFIX = "10.77.0"
NAMESPACES = ["--net", "--pid", "--mount", "--uts", "--ipc"]
BIN = Path(sys.executable).parent

INIT = """
import os, time
print(flush=True)
while True:
    try:
        os.wait()  # what loses its parent becomes this process's child
    except ChildProcessError:
        time.sleep(0.1)
"""


def skip_without_namespaces() -> None:
    """Skip the test, saying why, where this machine or user cannot make hosts."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for tool in ("ip", "unshare", "nsenter", "setpriv"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine (Debian's packages: iproute2, util-linux)")
    if subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let root make namespaces")


class Network:
    """A bridge that hosts are plugged into; `close` ends them all."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ml2o-net-"))
        self.names = {"localhost": "127.0.0.1"}
        self.hosts: list[Host] = []
        self._switch = Namespace()
        self._switch.run("ip link add bridge type bridge && ip link set bridge up")

    def host(self, name: str, number: int, aliases: Iterable[str] = (), environment: Mapping[str, str] = {}) -> Host:
        """Plug in a host, which all hosts know by its name and aliases, at the address PREFIX.number."""
        self.names |= dict.fromkeys([name, *aliases], f"{PREFIX}.{number}")
        made = Host(name, f"{PREFIX}.{number}", self.folder / name, environment)
        self.hosts.append(made)
        made.furnish()
        self._switch.plug_in(made, f"port{number}")
        text = "".join(f"{address} {known}\n" for known, address in self.names.items())
        for host in self.hosts:
            (host.folder / "hosts").write_text(text)  # in place: the file itself is mounted
        return made

    def end(self, host: Host) -> None:
        """SIGKILL all of a host's processes at once, as when its power is cut; its folder stays."""
        host.kill()
        self.hosts.remove(host)

    def close(self) -> None:
        for host in list(self.hosts):
            self.end(host)
        self._switch.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Namespace:
    """A first process in namespaces of its own; when it is killed, the kernel kills all others in them."""

    def __init__(self) -> None:
        command = ["setpriv", "--pdeathsig=KILL", "unshare", *NAMESPACES, "--fork", "--mount-proc"]
        command += ["--kill-child=SIGKILL", sys.executable, "-c", INIT]  # ends when the tests do, however they end
        self._parent = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self._parent.stdout is not None
        self._parent.stdout.readline()  # it is up
        children = Path(f"/proc/{self._parent.pid}/task/{self._parent.pid}/children").read_text().split()
        (self.pid,) = map(int, children)
        self.enter = ["nsenter", "--target", str(self.pid), "--all", "--"]

    def run(self, script: str, environment: Mapping[str, str] | None = None, timeout: float = 120) -> str:
        """Run a shell script there and return what it printed; AssertionError with all of it where it fails."""
        done = subprocess.run(
            [*self.enter, "bash", "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def plug_in(self, host: Host, port: str) -> None:
        """Join a host's eth0 to the bridge of this namespace."""
        inside = [
            "nsenter",
            "--target",
            str(self.pid),
            "--net",
            "--",
        ]  # without its processes: the host is none of them
        made = ["ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid)]
        subprocess.run([*inside, *made], check=True, capture_output=True, timeout=30)
        self.run(f"ip link set {port} master bridge up")
        host.run(
            f"ip link set lo up && ip link set eth0 up && ip address add {host.address}/24 dev eth0 && "
            "ip route add default dev eth0"
        )

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._parent.wait(timeout=30)


class Host(Namespace):
    """One machine.

    Attributes:
        address: its IPv4 address.
        folder: where this machine sees its /home (`home`), its /tmp/ray (`ray`) and the logs of what runs on it.
        environment: of whatever is run on it.
    """

    def __init__(self, name: str, address: str, folder: Path, environment: Mapping[str, str]) -> None:
        super().__init__()
        self.name, self.address, self.folder = name, address, folder
        kept = {
            key: os.environ[key] for key in ("ML2O_CACHE", "OMP_NUM_THREADS", "MKL_NUM_THREADS") if key in os.environ
        }
        self.environment = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "HOME": "/home/ray",
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAY_worker_niceness": "0",
            **kept,
            **environment,
        }

    def furnish(self) -> None:
        """Give it a name and folders of its own."""
        for part in ("home/ray", "ray"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        (self.folder / "hosts").touch()
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # refuses at once what no hosts file has
        Path("/tmp/ray").mkdir(exist_ok=True)  # where its own is mounted
        self.run(
            f"hostname {self.name} && mount -t tmpfs -o size=1g tmpfs /dev/shm && "
            f"mount --bind {self.folder}/ray /tmp/ray && mount --bind {self.folder}/home /home && "
            f"mount --bind {self.folder}/hosts /etc/hosts && mount --bind {self.folder}/resolv.conf /etc/resolv.conf"
        )

    def mount(self, folder: Path, path: str) -> None:
        """Have the host see a folder of this machine's at `path`, as it would a network folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.run(f"mkdir -p {path} && mount --bind {folder} {path}")

    def cut_off(self) -> None:
        """Take the cable out."""
        self.run("ip link set eth0 down")

    def join_again(self) -> None:
        """Put it back in; taking it out has cost the default route."""
        self.run("ip link set eth0 up && ip route replace default dev eth0")

    def sh(self, script: str, timeout: float = 180) -> str:
        """Run a script with the host's environment; see `Namespace.run`."""
        return self.run(script, self.environment, timeout)

    def start(self, command: list[str] | str, log: str, environment: Mapping[str, str] = {}) -> subprocess.Popen[bytes]:
        """Start a command that stays; what it prints goes to the file `log` in the host's folder."""
        script = command if isinstance(command, str) else shlex.join(command)
        with open(self.folder / log, "ab") as out:
            return subprocess.Popen(
                [*self.enter, "bash", "-c", script],
                stdout=out,
                stderr=out,
                env=self.environment | environment,
                start_new_session=True,
            )

    def command_lines(self) -> list[str]:
        """Return the command lines of all its living processes but the first."""
        mine, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if int(folder.name) != self.pid and os.readlink(folder / "ns" / "pid") == mine:
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        return [line for line in found if line]


@contextmanager
def hosts_with(process: str, hosts: Iterable[Host]) -> Iterator[set[str]]:
    """Give a set that, at the end of the `with` block, holds the names of the hosts on which the process was seen."""
    found: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            found.update(host.name for host in hosts if any(process in line for line in host.command_lines()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def until(done, seconds: float, why=lambda: "") -> None:
    """Wait until `done()` is true, which must not take longer than `seconds`."""
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, why()
        time.sleep(0.1)
