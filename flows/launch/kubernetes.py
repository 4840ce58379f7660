"""A stage as an indexed Kubernetes Job: one pod a node, torchrun in each, applied and followed with kubectl."""

import json
import logging
import re
import shutil
import subprocess
import time
from typing import Any

from flows.children import child
from flows.launch.rank_log import Progress, RankLog, WorkerError
from flows.launch.spec import KubernetesLaunch, WorkerSpec
from storage.errors import InputError

LOGGER = logging.getLogger(__name__)
PORT = 29500
MOUNT = "/ditflow"
_TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:]{8}(\.\d+)?Z")

Object = dict[str, Any]


def run(
    spec: WorkerSpec,
    launch: KubernetesLaunch,
    *,
    progress: Progress,
    log: "logging.Logger | logging.LoggerAdapter[logging.Logger]",
) -> None:
    """Apply the job, or find it there, and follow it to its end.

    When the caller is cancelled the job is deleted; when it is killed the job goes on. No cluster has run this
    yet: what is applied is checked against Kubernetes' own schemas.

    Raises:
        InputError: there is no kubectl here, the cluster refuses the job, or a rank found the input wrong.
        WorkerError: a rank failed.
    """
    if shutil.which("kubectl") is None:
        raise InputError("launch: no kubectl on the path; start the flow where the cluster can be reached")
    objects = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifest(spec, launch)})
    applied = _kubectl(launch, "apply", "-f", "-", given=objects)
    if applied.returncode:
        raise InputError(f"launch: Kubernetes refuses the job: {' '.join(applied.stderr.split())}")
    name, ranks = job_name(spec), RankLog(progress, log.info)
    log.info(f"Kubernetes job {name} in {launch.namespace}")
    try:
        heard = ""
        while (end := _end(name, launch)) is None:
            heard = _listen(name, launch, ranks, heard)
            time.sleep(launch.poll_seconds)
    finally:  # also when it ended well: nothing of it is needed any more
        _kubectl(launch, "delete", "job,service,configmap", name, "--wait=false")
    if end != "Complete":
        raise ranks.failure(1)


def manifest(spec: WorkerSpec, launch: KubernetesLaunch) -> list[Object]:
    """The objects to apply: what the ranks are to do, how pods find each other, and the job."""
    name = job_name(spec)
    about = {"name": name, "namespace": launch.namespace, "labels": {"app.kubernetes.io/managed-by": "ditflow"}}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": {"spec.json": spec.model_dump_json()}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": about,
            "spec": {"clusterIP": "None", "selector": {"job-name": name}, "publishNotReadyAddresses": True},
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": about,
            "spec": {
                "completionMode": "Indexed",
                "completions": launch.nodes,
                "parallelism": launch.nodes,
                "backoffLimit": launch.max_restarts * launch.nodes,
                "template": {"metadata": {"labels": {"job-name": name}}, "spec": _pod(name, launch)},
            },
        },
    ]


def job_name(spec: WorkerSpec) -> str:
    """The job's name, which is the output's, so that whoever asks for the same work finds it."""
    return f"ditflow-{spec.output.name}"


def _pod(name: str, launch: KubernetesLaunch) -> Object:
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={name}-0.{name}:{PORT}", f"--rdzv-id={name}"]
    torchrun = ["python", "-m", "torch.distributed.run", f"--nnodes={launch.nodes}", *meeting]
    container: Object = {
        "name": "ranks",
        "image": launch.image,
        "command": [*torchrun, f"--nproc-per-node={launch.nproc}", "-m", "flows.launch.worker", f"{MOUNT}/spec.json"],
        "env": [{"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"}],
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
        "subdomain": name,  # with it the pods of an indexed job have names that the others can look up
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 60,
        "containers": [container],
        "volumes": [{"name": "spec", "configMap": {"name": name}}, *volumes],
    }


def _end(name: str, launch: KubernetesLaunch) -> str | None:
    """``Complete`` or ``Failed`` when the job has ended, else None, also while the cluster does not answer."""
    done = _kubectl(launch, "get", "job", name, "--output=json")
    if done.returncode:
        if "NotFound" in done.stderr:
            raise WorkerError(f"Kubernetes job {name} was deleted before its end")
        LOGGER.warning("Kubernetes does not answer: %s", " ".join(done.stderr.split()))
        return None
    conditions = json.loads(done.stdout).get("status", {}).get("conditions") or []
    ended = [found["type"] for found in conditions if found["status"] == "True"]
    return next((end for end in ("Complete", "Failed") if end in ended), None)


def _listen(name: str, launch: KubernetesLaunch, ranks: RankLog, heard: str) -> str:
    """Read the log of the first pod, which has all that ranks on its node say, until it ends.

    Args:
        heard: the time of the last line that was read before; empty for none.

    Returns:
        That of the last one by now.
    """
    first = f"job-name={name},batch.kubernetes.io/job-completion-index=0"
    command = ["kubectl", "--namespace", launch.namespace, "logs", f"--selector={first}", "--tail=-1", "--follow"]
    since = [f"--since-time={heard}"] if heard else []  # of whole seconds
    with child([*command, "--timestamps", *since]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            time_of_line, _, text = line.partition(" ")
            if not _TIME.fullmatch(time_of_line):  # it is kubectl that speaks
                ranks.take([line])
            elif _digits(time_of_line) > _digits(heard):
                ranks.take([text])
                heard = time_of_line
    return heard


def _digits(moment: str) -> str:
    """A time as text that sorts: fractions of seconds have as many digits as they need."""
    seconds, _, fraction = moment.rstrip("Z").partition(".")
    return f"{seconds}.{fraction:0<9}"


def _kubectl(launch: KubernetesLaunch, *command: str, given: str = "") -> "subprocess.CompletedProcess[str]":
    whole = ["kubectl", "--namespace", launch.namespace, *command]
    return subprocess.run(whole, capture_output=True, text=True, check=False, input=given)
