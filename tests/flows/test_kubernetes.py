"""What is applied to a cluster, against Kubernetes' own schemas. No cluster runs it here."""

import json
import logging

import kubernetes_validate
import pytest

from flows import launch
from flows.kubernetes import KubernetesLaunch, job_name, manifest
from flows.worker import TrackingSpec, WorkerSpec
from storage.errors import InputError
from storage.manifest import Header, StageOutput

VERSION = "1.33"
HEADER = Header(stage="train", version=1, digest="ab" * 32, config={}, inputs={}, parents={})
SPEC = WorkerSpec(
    stage="train",
    config={"steps": 3},
    source="s3://bucket/runs/encode/x",
    output=StageOutput(uri="s3://bucket/runs/train/x", header=HEADER),
    tracking=TrackingSpec(uri="http://mlflow:5000", run_id=None),
)
EIGHT = KubernetesLaunch(
    kind="kubernetes", image="registry/ditflow:1", nodes=2, nproc=8, secret="s3", volumes={"data": "/data"}
)


@pytest.mark.parametrize("spec", [EIGHT, KubernetesLaunch(kind="kubernetes", image="x", gpus=False)])
def test_objects_fit_their_schemas(spec: KubernetesLaunch) -> None:
    for found in manifest(SPEC, spec):
        kubernetes_validate.validate(found, VERSION, strict=True)
    broken = manifest(SPEC, spec)[-1]
    broken["spec"]["parallelism"] = "two"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSION, strict=True)


def test_every_pod_runs_torchrun_on_the_spec_and_finds_the_first() -> None:
    values, service, job = manifest(SPEC, EIGHT)
    assert WorkerSpec.model_validate_json(values["data"]["spec.json"]) == SPEC
    assert {found["metadata"]["name"] for found in (values, service, job)} == {job_name(SPEC)}
    assert len(job_name(SPEC)) <= 63 - len("-00")  # a label, of which each pod's host name is made
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (2, 2)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert f"--rdzv-endpoint={job_name(SPEC)}-0.{service['metadata']['name']}:29500" in container["command"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert container["command"][-2:] == ["flows.worker", "/ditflow/spec.json"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"spec": "/ditflow", "data": "/data"}
    assert [volume["name"] for volume in pod["volumes"]] == list(mounted)
    assert "aws" not in json.dumps(job).lower()  # credentials come from the secret


def test_without_kubectl_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="launch: no kubectl on the path"):
        launch.run(SPEC, EIGHT, progress=lambda *_: None, log=logging.getLogger())
