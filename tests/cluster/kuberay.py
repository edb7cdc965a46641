"""What KubeRay (1.6) makes of our manifests: the fields of its resources that we use, and its `ray start` commands.

Facts from KubeRay's API reference (ray.io/v1) and its guide to rayStartParams.
"""

from __future__ import annotations

from typing import Any

GROUP = {
    "type": "object",
    "required": ["rayStartParams", "template"],
    "additionalProperties": False,
    "properties": {
        "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
        "template": {"type": "object"},
    },
}
COUNT = {"type": "integer", "minimum": 0}
WORKER_GROUP = GROUP | {
    "required": [*GROUP["required"], "groupName", "minReplicas", "maxReplicas"],
    "properties": GROUP["properties"]
    | {
        "groupName": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
    },
}
CLUSTER_SPEC = {
    "type": "object",
    "required": ["rayVersion", "headGroupSpec"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string"},
        "authOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"mode": {"enum": ["disabled", "token"]}, "secretName": {"type": "string"}},
        },
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "idleTimeoutSeconds": COUNT,
                "resources": {"type": "object"},
                "securityContext": {"type": "object"},
                "volumeMounts": {"type": "array", "items": {"type": "object"}},
            },
        },
        "headGroupSpec": GROUP,
        "workerGroupSpecs": {"type": "array", "items": WORKER_GROUP},
    },
}
JOB_SPEC = {
    "type": "object",
    "required": ["entrypoint"],
    "additionalProperties": False,
    "properties": {
        "clusterSelector": {"type": "object", "additionalProperties": {"type": "string"}},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "submitterPodTemplate": {"type": "object"},
        "entrypoint": {"type": "string"},
        "runtimeEnvYAML": {"type": "string"},
    },
}
METADATA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"name": {"type": "string"}, "generateName": {"type": "string"}},
}


def schema(spec: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the schema of a resource of `kind` with this `spec`."""
    return {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": kind},
            "metadata": METADATA,
            "spec": spec,
        },
    }


SCHEMAS = {"RayCluster": schema(CLUSTER_SPEC, "RayCluster"), "RayJob": schema(JOB_SPEC, "RayJob")}


def ray_start(group: dict[str, Any], head_address: str = "") -> list[str]:
    """Return the command of a group's Ray container: of a worker group with the address of the head's service.

    CPUs, memory and GPUs that rayStartParams does not have come from the container's limits, ports from KubeRay's
    defaults; it always adds --block.
    """
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    params = {
        "num-cpus": limits["cpu"],
        "memory": str(quantity(limits["memory"])),
        "metrics-export-port": "8080",
        "dashboard-agent-listen-port": "52365",
    }
    if "nvidia.com/gpu" in limits:
        params["num-gpus"] = limits["nvidia.com/gpu"]
    params |= {"address": head_address} if head_address else {"dashboard-host": "0.0.0.0"}
    words = [f"--{name}={value}" for name, value in sorted((params | group["rayStartParams"]).items())]
    return ["ray", "start", *([] if head_address else ["--head"]), *words, "--block"]


def quantity(text: str) -> int:
    """Read a Kubernetes quantity of memory or storage: 16Gi."""
    number, unit = text[:-2], text[-2:]
    return int(number) * 1024 ** ["Ki", "Mi", "Gi", "Ti"].index(unit) * 1024
