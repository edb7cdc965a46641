"""The Kubernetes manifests, by schema (Kubernetes' own, offline; KubeRay's fields that we use) and by meaning."""

from __future__ import annotations

import ast
import copy
import re
import shlex
from pathlib import PurePosixPath

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.cluster.files import ROOT, all_manifests, image, manifest, manifests, options, pinned, readme_commands
from tests.cluster.kuberay import SCHEMAS, quantity

KUBERNETES = kubernetes_validate.latest_version()
CLUSTER = manifest("raycluster", "RayCluster")["spec"]
JOB = manifest("rayjob", "RayJob")["spec"]
GROUPS = {"head": CLUSTER["headGroupSpec"], **{group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}}
POD_KINDS = ("Deployment", "StatefulSet")


def check(tree):
    """Raise where an object does not fit its schema, the pods in KubeRay's included."""
    if tree["kind"] not in SCHEMAS:
        kubernetes_validate.validate(tree, KUBERNETES, strict=True)
        return
    jsonschema.validate(tree, SCHEMAS[tree["kind"]])
    if tree["kind"] == "RayCluster":
        for group in (tree["spec"]["headGroupSpec"], *tree["spec"]["workerGroupSpecs"]):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def pods():
    """Return (name, pod spec) of everything that becomes a pod."""
    found = [(name, group["template"]["spec"]) for name, group in GROUPS.items()]
    return found + [
        (f"{tree['kind']} {tree['metadata']['name']}", tree["spec"]["template"]["spec"])
        for tree in all_manifests()
        if tree["kind"] in (*POD_KINDS, "Job")
    ]


def services():
    """Return the ports of each service by its name; KubeRay makes the head's."""
    made = {tree["metadata"]["name"]: tree["spec"] for tree in all_manifests() if tree["kind"] == "Service"}
    return {name: {port["port"] for port in spec["ports"]} for name, spec in made.items()}


@pytest.mark.parametrize("tree", all_manifests(), ids=lambda tree: f"{tree['kind']}-{tree['metadata'].get('name')}")
def test_objects_fit_their_schemas(tree):
    check(tree)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda tree: tree["spec"].update(enableAutoscaling=True),
        lambda tree: tree["spec"]["workerGroupSpecs"][0].pop("maxReplicas"),
        lambda tree: tree["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda tree: tree["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(imgae="x"),
    ],
)
def test_the_schema_can_refuse(break_it):
    tree = copy.deepcopy(manifest("raycluster", "RayCluster"))
    break_it(tree)
    with pytest.raises(jsonschema.ValidationError):
        check(tree)


def test_versions_are_the_pinned_ones():
    assert CLUSTER["rayVersion"] == pinned("ray")
    named = {container["image"] for name, pod in pods() for container in pod["containers"]}
    assert named - {image("cpu"), image("gpu")} == {"postgres:17"}


def test_the_head_takes_no_work_and_every_group_has_limits_that_equal_its_requests():
    assert GROUPS["head"]["rayStartParams"]["num-cpus"] == "0"
    for name, group in GROUPS.items():
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"], name
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    for _, pod in pods():
        assert all("limits" in container["resources"] for container in pod["containers"])


def test_gpus_are_asked_for_by_their_own_group_with_their_own_image():
    for name, group in GROUPS.items():
        (container,) = group["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")
        assert container["image"] == image("gpu" if name == "gpu" else "cpu")


def test_groups_scale_within_their_limits():
    assert CLUSTER["enableInTreeAutoscaling"] is True
    workers = CLUSTER["workerGroupSpecs"]
    assert {group["groupName"] for group in workers} == {"cpu", "cpu-spot", "gpu"}
    assert all(g["minReplicas"] <= g["replicas"] <= g["maxReplicas"] for g in workers)
    assert sum(group["minReplicas"] for group in workers) >= 1  # meta-training asks for all of its workers at once
    assert GROUPS["cpu-spot"]["template"]["spec"]["nodeSelector"]
    assert "nodeSelector" not in GROUPS["cpu"]["template"]["spec"]


def test_every_secret_and_its_key_is_made_by_a_command_of_the_readme():
    asked = {(CLUSTER["authOptions"]["secretName"], "auth_token")}  # the key that KubeRay reads
    for _, pod in pods():
        for container in pod["containers"]:
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    asked.add((reference["name"], reference["key"]))
    made = set()
    for command in readme_commands():
        if command.startswith("kubectl create secret generic"):
            words = shlex.split(command)
            made |= {(words[4], re.split("[=]", word)[1]) for word in words if word.startswith("--from-literal=")}
    assert asked == made
    assert CLUSTER["authOptions"]["mode"] == "token"


def test_a_stopped_job_has_time_for_its_checkpoint_before_its_pod_ends():
    pod = GROUPS["head"]["template"]["spec"]
    (container,) = pod["containers"]
    grace = int({v["name"]: v.get("value") for v in container["env"]}["RAY_JOB_STOP_WAIT_TIME_S"])
    assert grace >= 60
    assert pod["terminationGracePeriodSeconds"] >= grace + 30
    python, flag, script = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (python, flag) == ("python", "-c")
    ast.parse(script)


def test_what_is_deleted_now_and_then_leaves_run_directories_and_artifacts():
    for name in ("raycluster", "rayjob", "mlflow"):
        assert "PersistentVolumeClaim" not in {tree["kind"] for tree in manifests(name)}
    assert manifest("volumes", "PersistentVolumeClaim", "ml2o-runs")["spec"]["storageClassName"]


def test_pods_of_our_image_write_volumes_as_its_group():
    for name, pod in pods():
        if name in GROUPS or name == "Deployment mlflow":
            assert pod["securityContext"] == {"fsGroup": 100}, name


def test_the_owner_of_a_volume_that_ignores_the_group_is_set_once_by_root():
    pod = manifest("volumes", "Job")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["securityContext"] == {"runAsUser": 0}
    (mount,) = container["volumeMounts"]
    assert container["command"][:2] == ["bash", "-c"]
    test, change = container["command"][2].split(" || ")
    assert change == f"chown 1000:100 {mount['mountPath']}"
    assert test.endswith(f"test -w {mount['mountPath']}")
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "ml2o-runs"


def test_volumes_and_claims_exist():
    claims = {tree["metadata"]["name"] for tree in all_manifests() if tree["kind"] == "PersistentVolumeClaim"}
    asked = set()
    for name, pod in pods():
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        asked |= {volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values()}
        of_a_set = {"data"} if name.startswith("StatefulSet") else set()
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        assert mounted == set(volumes) | of_a_set, name
    assert asked == claims


def test_all_of_ray_shares_the_home_of_jobs():
    """A sweep's trials write into its run directory, wherever they run."""
    home = yaml.safe_load(JOB["runtimeEnvYAML"])["env_vars"]["ML2O_HOME"]
    for name, group in GROUPS.items():
        pod = group["template"]["spec"]
        (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == home]
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
        claim = manifest("volumes", "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"], name


def test_services_select_pods_and_meet_their_ports():
    by_label = {}
    for tree in all_manifests():
        if tree["kind"] in POD_KINDS:
            labels = tree["spec"]["template"]["metadata"]["labels"]
            assert tree["spec"]["selector"]["matchLabels"] == labels
            by_label[labels["app"]] = tree["spec"]["template"]["spec"]
    for tree in all_manifests():
        if tree["kind"] == "Service":
            ports = {p["name"]: p for c in by_label[tree["spec"]["selector"]["app"]]["containers"] for p in c["ports"]}
            for port in tree["spec"]["ports"]:
                assert ports[port["targetPort"]]["containerPort"] == port["port"]


def test_the_mlflow_server_runs_as_measured_and_lets_in_who_calls_it_by_its_name():
    deployment = manifest("mlflow", "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = options(container["args"])
    assert container["command"] == ["mlflow", "server"]
    assert words["workers"] == "1"
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    host, port = re.fullmatch(r"http://([\w.-]+):(\d+)", tracking_uri()).groups()
    assert int(port) in services()[host]
    assert int(words["port"]) == int(port) == container["ports"][0]["containerPort"]
    assert {host, f"{host}:{port}"} <= set(words["allowed-hosts"].split(","))
    assert tracking_uri() in words["cors-allowed-origins"].split(",")  # of its own pages, in a browser
    store = re.fullmatch(r"postgresql\+psycopg2://(\w+):\$\((\w+)\)@(\w+):(\d+)/(\w+)", environment[STORE])
    user, password, database_host, database_port, database = store.groups()
    names = [variable["name"] for variable in container["env"]]
    assert names.index(password) < names.index(STORE)  # Kubernetes puts in only what stands before
    assert int(database_port) in services()[database_host]
    postgres = manifest("mlflow", "StatefulSet", database_host)["spec"]["template"]["spec"]["containers"][0]
    made = {variable["name"]: variable.get("value") for variable in postgres["env"]}
    assert (made["POSTGRES_USER"], made["POSTGRES_DB"]) == (user, database)
    assert words["artifacts-destination"] in {mount["mountPath"] for mount in container["volumeMounts"]}
    # A service named mlflow would set MLFLOW_PORT=tcp://..., which `mlflow server` reads.
    assert pod["enableServiceLinks"] is False


STORE = "MLFLOW_BACKEND_STORE_URI"


def tracking_uri():
    (container,) = GROUPS["head"]["template"]["spec"]["containers"]
    return next(variable["value"] for variable in container["env"] if variable["name"] == "MLFLOW_TRACKING_URI")


def test_the_job_runs_on_the_cluster_with_what_jobs_get_there():
    assert JOB["clusterSelector"] == {"ray.io/cluster": manifest("raycluster", "RayCluster")["metadata"]["name"]}
    environment = yaml.safe_load(JOB["runtimeEnvYAML"])["env_vars"]
    assert environment == yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())["env_vars"]
    assert environment["MLFLOW_TRACKING_URI"] == tracking_uri()
    (container,) = GROUPS["head"]["template"]["spec"]["containers"]
    assert environment["ML2O_HOME"] in {mount["mountPath"] for mount in container["volumeMounts"]}
    words = shlex.split(JOB["entrypoint"])
    assert words[0] == "python"
    inside = PurePosixPath("/home/ray/ml2o_dist")  # the Dockerfile's WORKDIR
    for word in (words[1], words[words.index("--config") + 1]):
        assert (ROOT / PurePosixPath(word).relative_to(inside)).is_file(), word
    workers = int(words[words.index("--set") + 1].removeprefix("workers="))
    least = sum(
        group["minReplicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for group in CLUSTER["workerGroupSpecs"]
    )
    assert workers <= least


def test_quantities_are_read():
    assert quantity("16Gi") == 16 * 2**30
