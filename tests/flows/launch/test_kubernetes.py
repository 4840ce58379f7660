"""What is applied to a cluster, against Kubernetes' own schemas, and what is asked of kubectl. No cluster runs here."""

import json
import logging
import sys
from pathlib import Path

import kubernetes_validate
import pytest

from flows.launch import start as launcher
from flows.launch.kubernetes import manifest
from flows.launch.rank_log import MARK, WorkerError
from flows.launch.spec import KubernetesLaunch, WorkerSpec
from flows.tracking.spec import TrackingSpec
from storage.errors import InputError
from storage.header import Header
from storage.manifest import StageOutput

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
    assert {found["metadata"]["name"] for found in (values, service, job)} == {SPEC.job_name}
    assert len(SPEC.job_name) <= 63 - len("-00")  # a label, of which each pod's host name is made
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (2, 2)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert f"--rdzv-endpoint={SPEC.job_name}-0.{service['metadata']['name']}:29500" in container["command"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert container["command"][-2:] == ["flows.launch.worker", "/ditflow/spec.json"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"spec": "/ditflow", "data": "/data"}
    assert [volume["name"] for volume in pod["volumes"]] == list(mounted)
    assert "aws" not in json.dumps(job).lower()  # credentials come from the secret


def test_without_kubectl_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="launch: no kubectl on the path"):
        launcher.run(SPEC, EIGHT, progress=lambda *_: None, log=logging.getLogger())


KUBECTL = f"""#!{sys.executable}
import json, pathlib, sys
folder, asked = pathlib.Path(__file__).parent, sys.argv[3:]
given = sys.stdin.read() if asked[0] == "apply" else ""
with (folder / "asked").open("a") as file:
    file.write(json.dumps([sys.argv[1:3], asked, given]) + chr(10))
play = json.loads((folder / "play").read_text())
said = play[asked[0]]
if isinstance(said, list):
    turn = said.pop(0)
    (folder / "play").write_text(json.dumps(play))
    said = turn
print(said)
"""
RUNNING = json.dumps({"status": {}})


def ended(how: str) -> str:
    return json.dumps({"status": {"conditions": [{"type": how, "status": "True"}]}})


class Kubectl:
    """A kubectl that plays a part, and remembers what it was asked."""

    def __init__(self, folder: Path, **said: str | list[str]) -> None:
        self.folder = folder
        (folder / "play").write_text(json.dumps({"apply": "", "delete": ""} | said))
        (folder / "kubectl").write_text(KUBECTL)
        (folder / "kubectl").chmod(0o755)

    def asked(self, verb: str) -> list[tuple[list[str], str]]:
        lines = [json.loads(line) for line in (self.folder / "asked").read_text().splitlines()]
        assert all(namespace == ["--namespace", EIGHT.namespace] for namespace, _, _ in lines)
        return [(asked, given) for _, asked, given in lines if asked[0] == verb]


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def follow(noted: list[int]) -> None:
    quick = EIGHT.model_copy(update={"poll_seconds": 0.01})
    launcher.run(SPEC, quick, progress=lambda done, *_: noted.append(done), log=logging.getLogger("test"))


def step(second: str, done: int) -> str:
    return f"2026-11-21T10:00:{second}Z {MARK}" + json.dumps({"done": done, "total": 9, "unit": "steps"})


def test_a_job_is_applied_followed_and_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also when the log ends before the job does, and is told again from its last second on."""
    logs = ["\n".join([step("01.5", 1), "2026-11-21T10:00:01.51Z hello"]), "\n".join([step("01.5", 1), step("02", 2)])]
    kubectl = Kubectl(tmp_path, get=[RUNNING, RUNNING, ended("Complete")], logs=logs)
    noted: list[int] = []
    with caplog.at_level(logging.INFO):
        follow(noted)
    assert noted == [1, 2]
    assert caplog.messages.count("hello") == 1
    ((_, applied),) = kubectl.asked("apply")
    assert json.loads(applied)["items"] == json.loads(json.dumps(manifest(SPEC, EIGHT)))
    first, second = (asked for asked, _ in kubectl.asked("logs"))
    assert [each for each in second if each not in first] == ["--since-time=2026-11-21T10:00:01.51Z"]
    ((deleted, _),) = kubectl.asked("delete")
    assert deleted == ["delete", "job,service,configmap", SPEC.job_name, "--wait=false"]


def test_what_a_rank_found_wrong_is_told(tmp_path: Path) -> None:
    error = {"error": "train.batch_size: 9 does not divide", "kind": "InputError", "rank": 0, "foreseen": True}
    said = f"2026-11-21T10:00:01Z {MARK}{json.dumps(error)}"
    kubectl = Kubectl(tmp_path, get=[RUNNING, ended("Failed")], logs=said)
    with pytest.raises(InputError, match=r"^train\.batch_size: 9 does not divide$"):
        follow([])
    assert len(kubectl.asked("delete")) == 1


def test_a_job_that_somebody_deletes_is_an_error(tmp_path: Path) -> None:
    kubectl = Kubectl(tmp_path, get="", logs="")
    script = (
        (tmp_path / "kubectl").read_text().replace("print(said)", "sys.exit('NotFound' if asked[0] == 'get' else 0)")
    )
    (tmp_path / "kubectl").write_text(script)
    with pytest.raises(WorkerError, match="was deleted before its end"):
        follow([])
    assert len(kubectl.asked("delete")) == 1


class Cancelled(BaseException):
    """As Prefect cancels a flow."""


def test_a_cancelled_flow_deletes_its_job(tmp_path: Path) -> None:
    kubectl = Kubectl(tmp_path, get=RUNNING, logs=step("01", 1))

    def cancel(*_: object) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        launcher.run(SPEC, EIGHT, progress=cancel, log=logging.getLogger("test"))
    assert len(kubectl.asked("delete")) == 1
