"""The Slurm script: its words by bash, its logic with an srun that takes a command to a host of our own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading

import pytest

from tests.cluster.files import CLUSTER, ROOT
from tests.cluster.hosts import until
from tests.cluster.training import CONFIG, calm
from tests.wording import says

SCRIPT = CLUSTER / "slurm.sh"
HELD = ["--exclusive", "--nodes=", "--cpus-per-task=", "--time=", "--signal=B:TERM@"]

# Where the script runs, the first node, srun can enter the others only from outside: it leaves the command there as a
# file, and somebody outside starts it. It ends, or is ended, with the command.
SRUN = """#!/usr/bin/env bash
set -euo pipefail
for word in "$@"; do
    case "$word" in
        --nodelist=*) node="${word#--nodelist=}" ;;
        --*) ;;
        *) break ;;
    esac
    shift
done
while [[ "${1:-}" == --* ]]; do shift; done
asked="$(mktemp /home/ray/srun/XXXXXX)"
printf '%s\\n' "$node" "$(printf '%q ' "$@")" > "$asked.new"
env | grep -E '^(RAY|OMP|PATH|ML2O|MLFLOW)' > "$asked.env"
mv "$asked.new" "$asked.asked"
while [ ! -e "$asked.over" ]; do sleep 0.2; done
"""
SCONTROL = "#!/usr/bin/env bash\n[ \"$1 $2\" = 'show hostnames' ] && tr , '\\n' <<< \"$3\"\n"


def test_bash_and_slurm_can_read_it():
    subprocess.run(["bash", "-n", SCRIPT], check=True, timeout=10)
    lines = SCRIPT.read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert all(any(line.startswith(held) for line in asked) for held in HELD)
    code = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last < code  # Slurm reads no further
    assert os.access(SCRIPT, os.X_OK)


def test_what_slurm_gives_before_the_end_is_more_than_a_checkpoint_takes():
    (given,) = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH --signal=B:TERM@")]
    assert int(given.rpartition("@")[2]) >= 120


def test_srun_is_told_of_the_cpus_which_it_does_not_take_over():
    (line,) = [line.strip() for line in SCRIPT.read_text().splitlines() if line.strip().startswith("srun ")]
    assert '--cpus-per-task="$SLURM_CPUS_PER_TASK"' in line.split()


class Allocation:
    """Nodes on which `srun` starts what the script asks for; the script runs on the first."""

    def __init__(self, network, names):
        self.nodes = {name: network.host(name, number) for number, name in enumerate(names, start=1)}
        self.first = self.nodes[names[0]]
        home = self.first.folder / "home" / "ray"
        (home / "srun").mkdir()
        (home / "bin").mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (home / "bin" / name).write_text(text)
            (home / "bin" / name).chmod(0o755)
        self.environment = {
            "PATH": f"/home/ray/bin:{self.first.environment['PATH']}",
            "SLURM_JOB_NODELIST": ",".join(names),
            "SLURM_CPUS_PER_TASK": "2",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "ML2O_HOME": "/home/ray",
            "RAY_health_check_period_ms": "1000",
        }
        self.started = {}
        self._over = threading.Event()
        self._server = threading.Thread(target=self._serve, args=(home / "srun",))
        self._server.start()

    def _serve(self, folder):
        while not self._over.wait(0.1):
            for file in folder.glob("*.asked"):
                node, command = file.read_text().splitlines()
                variables = dict(line.split("=", 1) for line in file.with_suffix(".env").read_text().splitlines())
                file.rename(file.with_suffix(".begun"))
                self.started[node] = (command, self.nodes[node].start(command, "srun.log", variables))

    def sbatch(self, *words):
        """Start the script on the first node, as a process of its own, which Slurm would signal."""
        return self.first.start([str(SCRIPT), *words], "slurm.log", self.environment)

    def log(self):
        return "\n".join(file.read_text() for host in self.nodes.values() for file in host.folder.glob("*.log"))

    def close(self):
        self._over.set()
        self._server.join()


@pytest.fixture
def allocation(network):
    made = Allocation(network, ["node1", "node2", "node3"])
    try:
        yield made
    finally:
        made.close()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_job_runs_on_all_nodes_stops_with_a_checkpoint_and_goes_on(allocation, tmp_path):
    overrides = ["meta_steps=40", "horizon=[60]", "checkpoint_every=2", "workers=4", "compare=false"]
    words = ["--run-dir", "runs/job", *[w for o in [*overrides, "tracking.register=false"] for w in ("--set", o)]]
    run = allocation.first.folder / "home" / "ray" / "runs" / "job"
    script = allocation.sbatch("--config", str(CONFIG), *words)
    until(lambda: (run / "checkpoints" / "step_000006").exists() or script.poll() is not None, 240, allocation.log)
    assert script.poll() is None, allocation.log()
    commands = {node: command for node, (command, _) in allocation.started.items()}
    assert set(commands) == {"node1", "node2", "node3"}
    assert "--head" in commands["node1"]
    assert "--num-cpus=0" in commands["node1"]
    for name, host in allocation.nodes.items():
        assert any("ray::RolloutWorker" in line for line in host.command_lines()) == (name != "node1")
    (inside,) = allocation.first.sh("pgrep -f 'bash .*cluster/slurm.sh' | head -1").split()
    allocation.first.sh(f"kill -TERM {inside}")  # what --signal=B:TERM@180 does
    assert script.wait(timeout=120) == 143, allocation.log()
    assert says((run / "run.log").read_text(), "SIGTERM", "checkpoint at meta-step")
    for _, process in allocation.started.values():
        os.killpg(process.pid, signal.SIGKILL)  # Slurm ends what srun has begun
    for host in allocation.nodes.values():
        host.sh("ray stop --force")
    script = allocation.sbatch("--run-dir", "runs/job", "--resume", "--json")
    assert script.wait(timeout=240) == 0, allocation.log()
    (line,) = [
        line for line in (allocation.first.folder / "slurm.log").read_text().splitlines() if '{"run_dir"' in line
    ]
    assert json.loads(line)["weights_sha256"] == calm(tmp_path, *overrides)
