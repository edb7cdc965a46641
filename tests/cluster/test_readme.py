"""The README's commands: shell that bash reads, words that Ray, our jobs and MLflow know, edits that meet the files."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from ray.scripts.scripts import cli as ray

from ml2o_dist.cli import meta_train
from ml2o_dist.cli.sweep import sweep
from tests.cluster.files import CLUSTER, README, ROOT, readme_commands
from tests.cluster.kuberay import quantity

JOBS = {"jobs/meta_train.py": meta_train, "jobs/sweep.py": sweep, "cluster/slurm.sh": meta_train}
MADE = {"runs/sweep/config.yaml"}  # by the sweep before it


def options_of(command):
    return {name for parameter in command.params for name in parameter.opts}


def asked(words):
    return {word.partition("=")[0] for word in words if word.startswith("-") and word not in ("-", "--")}


def edits():
    """Return (expression, files) of each `sed -i`."""
    found = [shlex.split(command) for command in readme_commands() if command.startswith("sed -i")]
    return [(words[2], words[3:]) for words in found]


def edited(tmp_path, expressions, name):
    """Return a file of cluster/ after these expressions of sed."""
    copy = tmp_path / "edited.yaml"
    shutil.copy(CLUSTER / name, copy)
    for expression in expressions:
        subprocess.run(["sed", "-i", expression, copy], check=True, timeout=10)
    return copy.read_text()


@pytest.mark.parametrize("block", re.findall(r"(?:^    .*\n)+", README, re.MULTILINE))
def test_bash_reads_every_block(block):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=10)


def test_files_that_commands_name_are_there():
    named = set(re.findall(r"(?<![\w/])(?:cluster|jobs)/[\w./-]+\w", "\n".join(readme_commands())))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_ray_knows_its_commands():
    seen = 0
    for command in readme_commands():
        if not command.startswith("ray "):
            continue
        words = shlex.split(command.partition(" -- ")[0])[1:]
        known = ray
        while words and words[0] in getattr(known, "commands", {}):
            known = known.commands[words.pop(0)]
        assert not hasattr(known, "commands"), command
        assert asked(words) <= options_of(known), command
        seen += 1
    assert seen >= 10


def test_jobs_know_their_options_and_find_their_configs():
    seen = set()
    for command in readme_commands():
        for script, known in JOBS.items():
            if script in command and not command.startswith("scp"):
                chosen = sweep if "jobs/sweep.py" in command else known
                words = shlex.split(command.partition(script)[2])
                assert asked(words) <= options_of(chosen), command
                if "--config" in words:
                    config = words[words.index("--config") + 1]
                    assert config in MADE or (ROOT / config).is_file(), command
                seen.add(script)
    assert seen == set(JOBS)


def test_every_edit_finds_what_it_replaces(tmp_path):
    for expression, patterns in edits():
        for part in expression.split("; "):
            files = [file for pattern in patterns for file in ROOT.glob(pattern)]
            assert files, patterns
            changed = [
                file for file in files if edited(tmp_path, [part], file.relative_to(CLUSTER)) != file.read_text()
            ]
            assert changed, part
    registry = next(expression for expression, _ in edits() if "registry.example.com" in expression)
    assert "ghcr.io/me/ml2o-dist" in edited(tmp_path, [registry], "kubernetes/volumes.yaml")


def test_aws_edits_leave_no_placeholder_and_mount_the_folder(tmp_path):
    values = {"$AMI": "ami-1", "$GROUP": "sg-1", "$FILES": "fs-1", "$AWS_REGION": "eu-west-1"}
    expressions = [expression for expression, files in edits() if files == ["cluster/launcher/aws.yaml"]]
    for name, value in values.items():
        expressions = [expression.replace(name, value) for expression in expressions]
    tree = yaml.safe_load(edited(tmp_path, expressions, "launcher/aws.yaml"))
    assert "YOURS" not in str(tree)
    assert tree["provider"]["availability_zone"] == "eu-west-1a,eu-west-1b"
    assert any("fs-1.efs.eu-west-1.amazonaws.com:/ /mnt/ml2o" in line for line in tree["initialization_commands"])


def wanted(text):
    """Return the CPUs and GiB that the Kubernetes cluster asks for at the start, with this raycluster.yaml."""
    spec = yaml.safe_load(text)["spec"]
    servers = list(yaml.safe_load_all((CLUSTER / "kubernetes" / "mlflow.yaml").read_text()))
    pods = [tree["spec"]["template"] for tree in servers if "template" in tree["spec"]]
    pods += [spec["headGroupSpec"]["template"]]
    pods += [group["template"] for group in spec["workerGroupSpecs"] for _ in range(group["minReplicas"])]
    asked = [pod["spec"]["containers"][0]["resources"]["requests"] for pod in pods]
    asked.append(spec["autoscalerOptions"]["resources"]["requests"])
    cpus = sum(int(each["cpu"][:-1]) / 1000 if each["cpu"].endswith("m") else int(each["cpu"]) for each in asked)
    return f"{cpus:g} CPUs and {sum(quantity(each['memory']) for each in asked) >> 30} GiB"


def test_what_kubernetes_must_have_room_for_is_what_the_readme_says(tmp_path):
    stated = re.findall(r"[\d.]+ CPUs and \d+ GiB", README)
    smaller = [expression for expression, files in edits() if files == ["cluster/kubernetes/raycluster.yaml"]]
    file = CLUSTER / "kubernetes" / "raycluster.yaml"
    assert stated == [wanted(file.read_text()), wanted(edited(tmp_path, smaller, "kubernetes/raycluster.yaml"))]


def test_the_smaller_workers_have_room_for_the_smaller_job(tmp_path):
    (cluster,) = [expression for expression, files in edits() if files == ["cluster/kubernetes/raycluster.yaml"]]
    (job,) = [expression for expression, files in edits() if files == ["cluster/kubernetes/rayjob.yaml"]]
    groups = yaml.safe_load(edited(tmp_path, [cluster], "kubernetes/raycluster.yaml"))["spec"]["workerGroupSpecs"]
    cpus = int(groups[0]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert f"workers={cpus}" in edited(tmp_path, [job], "kubernetes/rayjob.yaml")


def test_mlflow_knows_the_options_of_the_server_for_slurm():
    from mlflow.cli import cli as mlflow  # takes seconds

    (command,) = [command for command in readme_commands() if "mlflow_server.sh --" in command]
    assert asked(shlex.split(command.removesuffix("&"))) <= options_of(mlflow.commands["server"])
    for word in ("--uvicorn-opts", "--app-name"):
        assert word in options_of(mlflow.commands["server"])
