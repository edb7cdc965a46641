#!/usr/bin/env bash
# sbatch cluster/slurm.sh --config jobs/configs/multimnist.yaml --run-dir runs/mm --set workers=24
# sbatch --nodes=1 cluster/slurm.sh --run-dir runs/mm --resume     goes on with a run that was stopped
# scancel --batch --signal=TERM JOBID                              stops it with a checkpoint; plain scancel kills
# From the repository, on a file system that all nodes see, with the environment of `make install` in .venv. JOB is what
# runs: JOB=jobs/sweep.py sbatch cluster/slurm.sh --config ... Nodes are the job's alone: --cpus-per-task= all their cores.
# The driver and its learner run beside the first node's Ray, which takes no other work; rollout workers run on the
# others, and where there is one node alone, on that. GPUs: sbatch --gres=gpu:1 ...; each node's are found by themselves.
#SBATCH --job-name=ml2o
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@180
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0
export ML2O_HOME="${ML2O_HOME:-$PWD}" JOB="${JOB:-jobs/meta_train.py}"
# One token for this job alone: what else runs on the nodes cannot speak to its Ray.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN="${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port="${RAY_PORT:-6379}"
address="$(getent ahostsv4 "${nodes[0]}" | awk 'NR == 1 {print $1}'):$port"
head_cpus=0
((${#nodes[@]} > 1)) || head_cpus="$SLURM_CPUS_PER_TASK"

started=()
on_node() { # NODE COMMAND...: run it there, beside this script
    # Since Slurm 22.05 srun does not take --cpus-per-task over from sbatch.
    srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --overlap --nodelist="$1" "${@:2}" &
    started+=("$!")
}
trap 'kill "${started[@]}" 2>/dev/null || true; wait' EXIT

on_node "${nodes[0]}" ray start --head --block --node-ip-address="${address%:*}" --port="$port" \
    --num-cpus="$head_cpus"
for node in "${nodes[@]:1}"; do
    on_node "$node" bash -c "until ray start --block --address=$address --num-cpus=$SLURM_CPUS_PER_TASK; do sleep 2; done"
done

# Meta-training asks for its workers at once: wait until all nodes are there.
python - "$address" "${#nodes[@]}" <<'PYTHON'
import sys, time
import ray

address, expected = sys.argv[1], int(sys.argv[2])
limit = time.monotonic() + 300
while True:
    try:
        if not ray.is_initialized():
            ray.init(address, log_to_driver=False)
        alive = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:
        alive = 0  # not up yet
    if alive == expected:
        break
    if time.monotonic() > limit:
        sys.exit(f"slurm.sh: {alive} of {expected} nodes joined Ray at {address} within 300 s")
    time.sleep(1)
PYTHON

RAY_ADDRESS="$address" python "$JOB" "$@" &
driver="$!"
trap 'kill -TERM "$driver"' TERM # Slurm's, 180 s before the time is up: the job writes a checkpoint and ends
status=0
wait "$driver" || status="$?"
while kill -0 "$driver" 2>/dev/null; do # wait was cut short by the signal
    status=0
    wait "$driver" || status="$?"
done
exit "$status"
