"""A stage as an indexed Kubernetes Job with torchrun in each pod, applied and followed with kubectl.

The job has the name of its output. It goes on when its flow is killed, and the next flow for the same output applies
it again, which changes nothing, and follows it. Kubernetes itself restarts pods that fail. No cluster has run this
yet: the objects are checked against Kubernetes' own schemas, and kubectl is a script in the tests.
"""

import json
import logging
import re
import shutil
import subprocess
import time
from typing import Any

from flows.children import child
from flows.launch import torchrun
from flows.launch.rank_log import Logger, Progress, RankLog, WorkerError
from flows.launch.spec import KubernetesLaunch, WorkerSpec
from storage.errors import InputError

LOGGER = logging.getLogger(__name__)
PORT = 29500
MOUNT = "/ditflow"
"""Folder of ``spec.json`` in each pod."""
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT[\d:]{8}(\.\d+)?Z")

Object = dict[str, Any]


def check() -> None:
    """Check that jobs can be applied from here.

    Raises:
        InputError: kubectl is not installed.
    """
    if shutil.which("kubectl") is None:
        raise InputError("launch: no kubectl on the path; start the flow on a machine that can reach the cluster")


def run(spec: WorkerSpec, launch: KubernetesLaunch, *, progress: Progress, log: Logger) -> None:
    """Apply the stage's job and follow it to its end.

    When the caller is cancelled the job is deleted; when it is killed the job goes on.

    Raises:
        InputError: kubectl is not installed here, the cluster refuses the job, or a rank found the input wrong.
        WorkerError: a rank failed, or somebody deleted the job.
    """
    check()
    objects = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifest(spec, launch)})
    applied = _kubectl(launch, "apply", "-f", "-", stdin=objects)
    if applied.returncode:
        raise InputError(f"launch: Kubernetes refuses the job: {' '.join(applied.stderr.split())}")
    name, ranks = spec.job_name, RankLog(progress, log.info)
    log.info(f"Kubernetes job {name} applied in namespace {launch.namespace}")
    try:
        last = ""
        while (end := _end_state(name, launch)) is None:
            last = _follow_log(name, launch, ranks, last)
            time.sleep(launch.poll_seconds)
    finally:  # after success, failure and cancellation alike
        _kubectl(launch, "delete", "job,service,configmap", name, "--wait=false")
    if end != "Complete":
        raise ranks.failure(1)


def manifest(spec: WorkerSpec, launch: KubernetesLaunch) -> list[Object]:
    """The objects to apply: a ConfigMap with the spec, a headless Service by which pods find each other, the Job."""
    name = spec.job_name
    metadata = {"name": name, "namespace": launch.namespace, "labels": {"app.kubernetes.io/managed-by": "ditflow"}}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"spec.json": spec.model_dump_json()}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"clusterIP": "None", "selector": {"job-name": name}, "publishNotReadyAddresses": True},
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": metadata,
            "spec": {
                "completionMode": "Indexed",
                "completions": launch.nodes,
                "parallelism": launch.nodes,
                "backoffLimit": launch.max_restarts * launch.nodes,
                "template": {"metadata": {"labels": {"job-name": name}}, "spec": _pod(name, launch)},
            },
        },
    ]


def _pod(name: str, launch: KubernetesLaunch) -> Object:
    rendezvous = torchrun.rendezvous(f"{name}-0.{name}:{PORT}", name)
    container: Object = {
        "name": "ranks",
        "image": launch.image,
        "command": torchrun.command("python", rendezvous, launch.nodes, launch.nproc, f"{MOUNT}/spec.json"),
        "env": [{"name": key, "value": value} for key, value in torchrun.ENV.items()],
        "volumeMounts": [
            {"name": "spec", "mountPath": MOUNT, "readOnly": True},
            *({"name": claim, "mountPath": path} for claim, path in launch.volumes.items()),
        ],
    }
    if launch.secret:
        container["envFrom"] = [{"secretRef": {"name": launch.secret}}]
    if launch.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": launch.nproc}}
    volumes = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in launch.volumes]
    return {
        "subdomain": name,  # gives each pod of an indexed job a host name in DNS
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 60,
        "containers": [container],
        "volumes": [{"name": "spec", "configMap": {"name": name}}, *volumes],
    }


def _end_state(name: str, launch: KubernetesLaunch) -> str | None:
    """``Complete`` or ``Failed``; None while the job runs or the cluster does not answer."""
    done = _kubectl(launch, "get", "job", name, "--output=json")
    if done.returncode:
        if "NotFound" in done.stderr:
            raise WorkerError(f"Kubernetes job {name} was deleted before its end")
        LOGGER.warning("Kubernetes does not answer: %s", " ".join(done.stderr.split()))
        return None
    conditions = json.loads(done.stdout).get("status", {}).get("conditions") or []
    true = [condition["type"] for condition in conditions if condition["status"] == "True"]
    return next((end for end in ("Complete", "Failed") if end in true), None)


def _follow_log(name: str, launch: KubernetesLaunch, ranks: RankLog, last: str) -> str:
    """Read the log of the first pod, which has the lines of all ranks in it, until it ends.

    Args:
        name: of the job.
        launch: names the namespace.
        ranks: takes the lines.
        last: timestamp of the last line that was read before; empty for none.

    Returns:
        The timestamp of the last line that has been read now.
    """
    first = f"job-name={name},batch.kubernetes.io/job-completion-index=0"
    command = ["kubectl", "--namespace", launch.namespace, "logs", f"--selector={first}", "--tail=-1", "--follow"]
    since = [f"--since-time={last}"] if last else []  # rounded to seconds: some lines come twice
    with child([*command, "--timestamps", *since]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            timestamp, _, text = line.partition(" ")
            if not _TIMESTAMP.fullmatch(timestamp):  # a message of kubectl itself
                ranks.read([line])
            elif _sort_key(timestamp) > _sort_key(last):
                ranks.read([text])
                last = timestamp
    return last


def _sort_key(timestamp: str) -> str:
    """A timestamp with nine digits after the second: Kubernetes leaves out trailing zeros."""
    seconds, _, fraction = timestamp.rstrip("Z").partition(".")
    return f"{seconds}.{fraction:0<9}"


def _kubectl(launch: KubernetesLaunch, *arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    command = ["kubectl", "--namespace", launch.namespace, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=stdin)
