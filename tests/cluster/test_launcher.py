"""The cluster launcher's YAML, by Ray's own validator and by meaning."""

from __future__ import annotations

import copy
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config  # what `ray up` does first; works offline

from tests.cluster.files import CLUSTER, LAUNCHERS, image, launcher, options

CLOUDS = ("aws", "gcp")


def prepared(name):
    config = prepare_config(copy.deepcopy(launcher(name)))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_takes_the_file(name):
    assert prepared(name)["provider"]["type"] == {"onprem": "local"}.get(name, name)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_validator_can_refuse(name):
    config = launcher(name) | {"max_wrokers": 3}
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_images_are_ours_with_the_pinned_ray(name):
    config = launcher(name)
    dockers = [config["docker"], *(kind.get("docker", {}) for kind in config.get("available_node_types", {}).values())]
    named = {docker[key].partition("@")[0] for docker in dockers for key in docker if key.endswith("image")}
    assert named == {image("cpu"), image("gpu")} if name in CLOUDS else {image("cpu")}
    if name == "onprem":  # GPUs are commented lines
        assert "# worker_run_options: [--gpus all]" in (CLUSTER / "launcher" / "onprem.yaml").read_text()
        assert "worker_run_options" not in config["docker"]


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_takes_no_work_and_workers_do(name):
    kinds = prepared(name)["available_node_types"]
    head = kinds.pop(launcher(name)["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert all(kind["resources"]["CPU"] > 0 for kind in kinds.values())


@pytest.mark.parametrize("name", LAUNCHERS)
def test_workers_come_and_go_within_limits(name):
    config = prepared(name)
    workers = [kind for key, kind in config["available_node_types"].items() if key != "head"]
    assert all(0 <= kind["min_workers"] <= kind["max_workers"] <= config["max_workers"] for kind in workers)
    assert sum(kind["min_workers"] for kind in workers) >= 1  # meta-training asks for all of its workers at once
    if name in CLOUDS:
        assert any(kind["min_workers"] < kind["max_workers"] for kind in workers)
        assert config["idle_timeout_minutes"] > 0


def test_all_machines_of_ones_own_are_started_and_stay():
    config = prepared("onprem")
    machines = len(config["provider"]["worker_ips"])
    kind = config["available_node_types"][config["head_node_type"]]
    assert (kind["min_workers"], kind["max_workers"]) == (machines, machines)


def test_every_node_of_aws_has_an_image_and_the_group_that_the_readme_makes():
    for kind in prepared("aws")["available_node_types"].values():
        assert (kind["node_config"]["ImageId"], kind["node_config"]["SecurityGroupIds"]) == ("ami-YOURS", ["sg-YOURS"])


@pytest.mark.parametrize("name", CLOUDS)
def test_gpus_are_only_on_their_own_nodes_with_their_own_image(name):
    for key, kind in launcher(name)["available_node_types"].items():
        gpus = kind["resources"].get("GPU", 0)
        assert (gpus > 0) == (key == "worker_gpu")
        if gpus:
            assert kind["docker"] == {"worker_image": image("gpu"), "worker_run_options": ["--gpus all"]}
        if name == "gcp":
            assert sum(card["acceleratorCount"] for card in kind["node_config"].get("guestAccelerators", [])) == gpus


@pytest.mark.parametrize("name", CLOUDS)
def test_there_are_spot_workers_and_workers_that_stay_and_the_head_stays(name):
    def is_spot(kind):
        config = kind["node_config"]
        scheduling = {key: value for each in config.get("scheduling", []) for key, value in each.items()}
        return config.get("InstanceMarketOptions", {}).get("MarketType") == "spot" or bool(
            scheduling.get("preemptible")
        )

    spot = {key: is_spot(kind) for key, kind in launcher(name)["available_node_types"].items()}
    assert spot == {"head": False, "worker_cpu": False, "worker_cpu_spot": True, "worker_gpu": True}


def home(config):
    """Return the host's folder that is ML2O_HOME in the container."""
    (volume,) = [option.split()[1] for option in config["docker"]["run_options"] if option.startswith("--volume")]
    folder, _, inside = volume.partition(":")
    assert inside == yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())["env_vars"]["ML2O_HOME"]
    return folder


def uncommented(name):
    """Return the file with the commented items of its lists taken in."""
    return yaml.safe_load((CLUSTER / "launcher" / f"{name}.yaml").read_text().replace("\n  # - ", "\n  - "))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_shared_folder_is_mounted_at_the_home_of_jobs_before_its_owner_is_set(name):
    folder = home(launcher(name))
    made, owned = launcher(name)["initialization_commands"]
    assert made == f"sudo mkdir -p {folder}"
    taken_in = uncommented(name)
    validate_config(prepare_config(taken_in))
    first, client, mount, last = taken_in["initialization_commands"]
    assert (first, last) == (made, owned)
    assert "nfs-common" in client
    assert shlex.split(mount)[:4] == ["mountpoint", "-q", folder, "||"]
    assert shlex.split(mount)[-1] == folder
    for command in (made, client, mount, owned):
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=10)


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(
    ("owner", "squashed", "status", "left"),
    [((0, 0), False, 0, (1000, 100)), ((1000, 1000), True, 0, (1000, 1000)), ((0, 0), True, 1, (0, 0))],
    ids=["ours to set", "set by the server", "refused by the server"],
)
def test_the_images_user_can_write_the_home_of_jobs_or_ray_up_ends(name, owner, squashed, status, left, tmp_path):
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv (Debian's package util-linux)")
    (tmp_path / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "chown").write_text('#!/bin/sh\necho "Operation not permitted" >&2\nexit 1\n')
    for stub in ("sudo", "chown") if squashed else ("sudo",):
        (tmp_path / stub).chmod(0o755)
    with tempfile.TemporaryDirectory() as made:  # not tmp_path: the image's user cannot enter that
        folder = Path(made)
        folder.chmod(0o755)
        os.chown(folder, *owner)
        command = launcher(name)["initialization_commands"][-1].replace(home(launcher(name)), made)
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(["bash", "-c", command], env={"PATH": path}, capture_output=True, timeout=10, check=False)
        assert done.returncode == status, done.stderr
        assert (folder.stat().st_uid, folder.stat().st_gid) == left


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_starts_with_the_token_on_the_same_port_everywhere(name):
    config = launcher(name)
    # Where Ray and MLflow look for them.
    assert config["file_mounts"] == {name: name for name in ("~/.ray/auth_token", "~/.mlflow/credentials")}
    (head,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    (worker,) = [line for line in config["worker_start_ray_commands"] if "ray start" in line]
    assert options(head)["port"] == options(worker)["address"].rpartition(":")[2] == "6379"
    assert options(head)["num-cpus"] == "0"
    assert options(head)["autoscaling-config"] == "~/ray_bootstrap_config.yaml"
    assert "head" in options(head)
    assert "head" not in options(worker)
    assert all("RAY_AUTH_MODE=token" in line for line in (head, worker))
    assert "RAY_JOB_STOP_WAIT_TIME_S=120" in head  # read where jobs are supervised: on the head
