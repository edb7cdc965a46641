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
    spec = tree["spec"]
    if tree["kind"] == "RayCluster":
        templates = [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
        parts = {key: spec["autoscalerOptions"][key] for key in ("resources", "securityContext", "volumeMounts")}
        templates.append({"spec": {"containers": [{"name": "autoscaler", **parts}]}})
    else:
        templates = [spec["submitterPodTemplate"]]
    for template in templates:
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def pods():
    """Return (name, pod spec) of everything that becomes a pod."""
    found = [(name, group["template"]["spec"]) for name, group in GROUPS.items()]
    found.append(("submitter", JOB["submitterPodTemplate"]["spec"]))
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
        lambda tree: tree["spec"]["autoscalerOptions"]["securityContext"].update(capabilties={}),
    ],
)
def test_the_schema_can_refuse(break_it):
    tree = copy.deepcopy(manifest("raycluster", "RayCluster"))
    break_it(tree)
    with pytest.raises(jsonschema.ValidationError):
        check(tree)


def test_versions_are_the_pinned_ones():
    assert CLUSTER["rayVersion"] == pinned("ray")
    named = {container["image"].partition("@")[0] for name, pod in pods() for container in pod["containers"]}
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


def secret_files(pod):
    """Return (secret, key, file in the container) of each secret that a pod mounts."""
    found = set()
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
    for volume in pod.get("volumes", []):
        sources = [source["secret"] for source in volume.get("projected", {}).get("sources", []) if "secret" in source]
        for secret in [volume["secret"]] if "secret" in volume else sources:
            name = secret.get("name") or secret["secretName"]
            found |= {(name, item["key"], f"{mounts[volume['name']]}/{item['path']}") for item in secret["items"]}
    return found


def test_every_secret_and_its_key_is_made_by_a_command_of_the_readme():
    asked = {(CLUSTER["authOptions"]["secretName"], "auth_token")}  # the key that KubeRay reads
    for name, pod in pods():
        asked |= {(secret, key) for secret, key, _ in secret_files(pod)}
        # A variable is seen by whoever sees the process.
        assert not [v for container in pod["containers"] for v in container.get("env", []) if "valueFrom" in v], name
    made = set()
    for command in readme_commands():
        _, creates, rest = command.partition("kubectl create secret generic ")
        if creates and "ml2o-registry" not in rest:
            words = shlex.split(rest)
            made |= {(words[0], word.split("=")[1]) for word in words if word.startswith("--from-file=")}
    assert asked == made
    assert CLUSTER["authOptions"]["mode"] == "token"


def test_secrets_are_files_where_they_are_read_that_others_cannot_read():
    assert secret_files(pod_of("Deployment mlflow")) == {
        ("ml2o-mlflow", "password", "/run/secrets/ml2o/mlflow-password"),
        ("ml2o-postgres", "password", "/run/secrets/ml2o/postgres-password"),
    }
    postgres = pod_of("StatefulSet postgres")
    ((_, _, file),) = secret_files(postgres)
    (container,) = postgres["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["POSTGRES_PASSWORD_FILE"] == file
    assert "POSTGRES_PASSWORD" not in environment
    assert secret_files(GROUPS["head"]["template"]["spec"]) == {
        ("ml2o-mlflow", "credentials", "/home/ray/.mlflow/credentials")  # where MLflow's client looks
    }
    for name, pod in pods():
        for volume in pod.get("volumes", []):
            for kind in ("secret", "projected"):
                if kind in volume:
                    assert volume[kind]["defaultMode"] == 0o440, name
                    mounts = [m for c in pod["containers"] for m in c["volumeMounts"] if m["name"] == volume["name"]]
                    assert all(mount["readOnly"] for mount in mounts)


def pod_of(name):
    (found,) = [pod for each, pod in pods() if each == name]
    return found


ROOT_JOB = "Job ml2o-runs-owner"


@pytest.mark.parametrize(("name", "pod"), pods(), ids=[name for name, _ in pods()])
def test_pods_have_as_few_rights_as_can_be(name, pod):
    """Kubernetes' standard `restricted`, but for the one Job that must be root for a moment."""
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"]["drop"] == ["ALL"]
        assert "privileged" not in context
        if name == ROOT_JOB:
            assert set(context["capabilities"]["add"]) == {"CHOWN", "SETUID", "SETGID"}  # chown, setpriv
            continue
        assert "add" not in context["capabilities"]
        assert "runAsUser" not in context
    if name != ROOT_JOB:
        who = (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"])
        assert who == ((999, 999) if "postgres" in name else (1000, 100))  # the images' users
        assert pod["securityContext"]["runAsNonRoot"] is True


def test_of_ray_the_autoscaler_alone_has_a_token_for_kubernetes():
    from ray.autoscaler._private.kuberay import node_provider

    options = CLUSTER["autoscalerOptions"]
    assert options["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    (mount,) = options["volumeMounts"]
    (volume,) = [each for each in GROUPS["head"]["template"]["spec"]["volumes"] if each["name"] == mount["name"]]
    files = set()
    for source in volume["projected"]["sources"]:
        if "serviceAccountToken" in source:
            files.add(source["serviceAccountToken"]["path"])
        for item in source.get("configMap", source.get("downwardAPI", {})).get("items", []):
            files.add(item["path"])
    read = {node_provider.IN_CLUSTER_TOKEN_PATH, node_provider.IN_CLUSTER_CA_CERT_PATH}
    assert read <= {f"{mount['mountPath']}/{file}" for file in files}
    for name, pod in pods():
        mounted = {each["name"] for container in pod["containers"] for each in container.get("volumeMounts", [])}
        assert mount["name"] not in mounted, name


def test_servers_are_watched_for_being_ready_and_for_being_alive():
    for name in ("Deployment mlflow", "StatefulSet postgres"):
        (container,) = pod_of(name)["containers"]
        ready, alive = container["readinessProbe"], container["livenessProbe"]
        kind = "httpGet" if "mlflow" in name else "exec"
        assert ready[kind] == alive[kind]
        # It is not ended for a moment's load.
        assert alive["periodSeconds"] * alive["failureThreshold"] >= 60
        assert alive["timeoutSeconds"] >= 5
    for group in GROUPS.values():  # KubeRay puts its own in where there are none
        assert not {"readinessProbe", "livenessProbe"} & set(group["template"]["spec"]["containers"][0])


def labels_of(name):
    """Return the labels that a pod has in the end; KubeRay adds those of ray.io."""
    kind = {"head": "head"}.get(name, "worker")
    if name in GROUPS:
        return GROUPS[name]["template"].get("metadata", {}).get("labels", {}) | {
            "ray.io/cluster": manifest("raycluster", "RayCluster")["metadata"]["name"],
            "ray.io/node-type": kind,
        }
    if name == "submitter":
        return JOB["submitterPodTemplate"]["metadata"]["labels"]
    if name in ("Deployment mlflow", "StatefulSet postgres"):
        return manifest("mlflow", name.split()[0])["spec"]["template"]["metadata"]["labels"]
    return {
        "operator": {"app.kubernetes.io/name": "kuberay-operator"},
        "somebody": {"app": "web"},
        "allowed": {"ml2o/tracking": "allowed"},
    }[name]


def fits(selector, labels):
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def reaches(one, other, port, elsewhere=False):
    """Tell whether the policies let the pod `one` open a connection to a port of `other`, as Kubernetes reads them."""

    def lets(direction, own, peer, peers_key):
        rules = [
            policy["spec"]
            for policy in all_manifests()
            if policy["kind"] == "NetworkPolicy"
            and direction in policy["spec"]["policyTypes"]
            and fits(policy["spec"]["podSelector"], own)
        ]
        if not rules:
            return True  # no policy of this direction is about it
        for rule in (rule for spec in rules for rule in spec.get(direction.lower(), [])):
            ports = {(each["protocol"], each["port"]) for each in rule.get("ports", [])}
            if ports and ("TCP", port) not in ports:
                continue
            peers = rule.get(peers_key)
            if peers is None:
                return True
            for each in peers:
                if ("namespaceSelector" in each or not elsewhere) and fits(each["podSelector"], peer):
                    return True
        return False

    own, peer = labels_of(one), labels_of(other)
    return lets("Egress", own, peer, "to") and lets("Ingress", peer, own, "from")


RAY = ["head", "cpu", "cpu-spot", "gpu"]
MLFLOW, POSTGRES = "Deployment mlflow", "StatefulSet postgres"
EVERYBODY = [*RAY, "submitter", MLFLOW, POSTGRES, "operator", "somebody", "allowed"]


@pytest.mark.parametrize(
    ("target", "port", "who"),
    [
        (MLFLOW, 5000, {*RAY, "allowed"}),
        (MLFLOW, 22, set()),
        (POSTGRES, 5432, {MLFLOW}),
        ("head", 6379, set(RAY)),
        ("head", 8265, {*RAY, "submitter", "operator"}),
        ("head", 10001, set(RAY)),
        ("cpu", 8076, set(RAY)),
        ("gpu", 52365, set(RAY)),
        ("somebody", 80, {*RAY, "submitter", "operator", "somebody", "allowed"}),  # MLflow and PostgreSQL go nowhere
    ],
)
def test_who_reaches_whom(target, port, who):
    assert {one for one in EVERYBODY if one != target and reaches(one, target, port)} == who - {target}


def test_no_service_is_seen_outside_of_the_cluster():
    for tree in all_manifests():
        assert tree["kind"] not in ("Ingress", "Gateway", "HTTPRoute")
        if tree["kind"] == "Service":
            assert tree["spec"].get("type", "ClusterIP") == "ClusterIP"
            assert "externalIPs" not in tree["spec"]


def test_of_other_namespaces_the_operator_alone_reaches_the_head():
    for target, port in ((MLFLOW, 5000), (POSTGRES, 5432), ("head", 8265), ("head", 6379), ("cpu", 8076)):
        found = {one for one in EVERYBODY if reaches(one, target, port, elsewhere=True)}
        assert found == ({"operator"} if (target, port) == ("head", 8265) else set()), (target, port)


def test_policies_come_before_what_they_close():
    applied = [c.split("/")[-1] for c in readme_commands() if c.startswith("kubectl apply -f cluster/kubernetes/")]
    assert applied[0] == "network.yaml"
    assert {"volumes.yaml", "mlflow.yaml", "raycluster.yaml"} == set(applied[1:])


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
            assert pod["securityContext"]["fsGroup"] == 100, name


def test_the_owner_of_a_volume_that_ignores_the_group_is_set_once_by_root():
    pod = manifest("volumes", "Job")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["securityContext"]["runAsUser"] == 0
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
        asked |= {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
        of_a_set = {"data"} if name.startswith("StatefulSet") else set()
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        if name == "head":
            mounted |= {mount["name"] for mount in CLUSTER["autoscalerOptions"]["volumeMounts"]}
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
    assert container["command"] == ["/home/ray/ml2o_dist/cluster/mlflow_server.sh"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    host, port = re.fullmatch(r"http://([\w.-]+):(\d+)", tracking_uri()).groups()
    assert int(port) in services()[host]
    assert int(words["port"]) == int(port) == container["ports"][0]["containerPort"]
    assert {f"{host}:{port}", f"localhost:{port}"} <= set(words["allowed-hosts"].split(","))
    assert tracking_uri() in words["cors-allowed-origins"].split(",")  # of its own pages, in a browser
    store = re.fullmatch(r"postgresql\+psycopg2://(\w+)@(\w+):(\d+)/(\w+)", environment[STORE])
    user, database_host, database_port, database = store.groups()
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
