"""`ditflow up` for several people: Postgres, passwords, artifacts on S3, and an address that others reach."""

import base64
import json
import os
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.server.auth.client import AuthServiceClient
from pipelines import STAGES, arguments, ditflow
from postgres_server import PASSWORD as DATABASE_PASSWORD
from postgres_server import PostgresServer, postgres_server, reason_not_to
from prefect_rest import call, send
from s3_endpoint import BUCKET, SECRET, s3_server

from flows import servers
from flows.access import MLFLOW_PASSWORD, POSTGRES, PREFECT_PASSWORD

ADDRESSES = [
    address.address
    for addresses in psutil.net_if_addrs().values()
    for address in addresses
    if address.family == socket.AF_INET and not address.address.startswith("127.")
]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(reason_not_to() is not None, reason=str(reason_not_to())),
    pytest.mark.skipif(not ADDRESSES, reason="this machine has no address but loopback"),
]
PREFECT = "lab:of-the-lab-that-nobody-else-has"
ADMIN = "of-the-admin-%-that-nobody-has"
FIRST, ADA, BOB = "first-of-ada-for-a-day", "ada-chose-this-one-herself", "bob-got-this-one-from-her"
ROOT = f"s3://{BUCKET}/runs"


class Lab:
    """A running ``ditflow up --servers-only``, started as on a machine of its own."""

    def __init__(self, folder: Path, postgres: PostgresServer, store: dict[str, str]) -> None:
        self.folder, self.host, self.postgres = folder, ADDRESSES[0], postgres
        self._ports, self.store = (servers.free_port(), servers.free_port()), store
        self.prefect, self.mlflow = (f"http://{self.host}:{port}" for port in self._ports)
        self.log = folder / "up.log"

    def start(self) -> None:
        given = {POSTGRES: self.postgres.url, PREFECT_PASSWORD: PREFECT, MLFLOW_PASSWORD: ADMIN} | self.store
        ports = ["--prefect-port", str(self._ports[0]), "--mlflow-port", str(self._ports[1])]
        command = ditflow("up", "--servers-only", "--host", self.host, "--root", ROOT, *ports)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | given, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        self.said = ""
        while "Ctrl-C" not in self.said:
            line = self.process.stdout.readline()
            assert line, self.log.read_text()
            self.said += line

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(180)

    def env(self, user: str, password: str) -> dict[str, str]:
        """What a person sets on his machine."""
        return self.store | {
            "PREFECT_API_URL": f"{self.prefect}/api",
            "PREFECT_API_AUTH_STRING": PREFECT,
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
            "DITFLOW_ROOT": ROOT,
        }

    def bucket(self) -> Any:
        """A client of the store."""
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.store["AWS_ENDPOINT_URL"], **keys)

    def run(self, user: str, password: str, *command: str) -> "subprocess.CompletedProcess[str]":
        """A command of a person, on a machine of his own."""
        own = self.folder / user
        own.mkdir(exist_ok=True)
        env = os.environ | self.env(user, password) | {"XDG_CACHE_HOME": str(own / "cache")}
        return subprocess.run(ditflow(*command), cwd=own, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with ExitStack() as stack:
        postgres, store = stack.enter_context(postgres_server()), stack.enter_context(s3_server())
        postgres.create_databases()
        no_proxy = store["NO_PROXY"] + f",{ADDRESSES[0]}"
        lab = Lab(tmp_path_factory.mktemp("lab"), postgres, store | {"NO_PROXY": no_proxy, "no_proxy": no_proxy})
        lab.start()
        stack.callback(lab.stop)
        yield lab


@pytest.fixture(autouse=True)
def login(monkeypatch: pytest.MonkeyPatch, lab: Lab) -> None:
    """MLflow's clients in this process, which read their login at each call."""
    monkeypatch.setenv("NO_PROXY", lab.env("", "")["NO_PROXY"])
    monkeypatch.setenv("no_proxy", lab.env("", "")["NO_PROXY"])
    log_in(monkeypatch, "admin", ADMIN)


def log_in(monkeypatch: pytest.MonkeyPatch, user: str, password: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)


@pytest.fixture(scope="module")
def people(lab: Lab) -> None:
    """Two, one of whom has chosen her own password."""
    with pytest.MonkeyPatch.context() as patch:
        log_in(patch, "admin", ADMIN)
        users = AuthServiceClient(lab.mlflow)
        users.create_user("ada", FIRST)
        users.create_user("bob", BOB)
        log_in(patch, "ada", FIRST)
        users.update_user_password("ada", ADA, current_password=FIRST)


@pytest.fixture(scope="module")
def report(lab: Lab, people: None, digits: Path) -> dict[str, Any]:
    """Of a whole pipeline that one of them has run."""
    done = lab.run("ada", ADA, *arguments("run", ROOT, digits, "--set", "train.held_out=null"))
    assert done.returncode == 0, done.stderr
    assert "MLflow" not in done.stderr
    return dict(json.loads(done.stdout))


def test_the_servers_say_where_they_are_and_not_their_passwords(lab: Lab) -> None:
    assert f"Prefect  {lab.prefect}\n" in lab.said
    assert f"MLflow   {lab.mlflow}/#/experiments/1/runs?workflowType=machine_learning\n" in lab.said
    assert call(lab.prefect, "/deployments/filter", {}, PREFECT) == []
    assert call(lab.prefect, "/work_pools/filter", {}, PREFECT) == []
    for port in (lab.prefect, lab.mlflow):
        assert servers.is_free(int(port.rpartition(":")[2]))  # nobody listens on another address


def test_a_person_runs_a_pipeline_and_others_see_it(
    lab: Lab, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {stage["name"] for stage in report["stages"]} == set(STAGES)
    states = call(lab.prefect, "/flow_runs/filter", {}, PREFECT)
    assert {run["state"]["type"] for run in states} == {"COMPLETED"}
    assert len(states) == len(STAGES) + 1
    log_in(monkeypatch, "bob", BOB)
    client, run = MlflowClient(lab.mlflow), report["mlflow_run_ids"]["train"]
    assert client.get_run(run).info.status == "FINISHED"
    manifest = json.loads(Path(client.download_artifacts(run, "manifest.json")).read_bytes())
    assert manifest["stage"] == "train"
    client.set_tag(run, "seen by", "bob")  # the experiment is everybody's
    (version,) = client.search_model_versions()
    client.set_registered_model_alias(version.name, "mine", version.version)


def test_artifacts_are_on_s3_and_come_from_the_server(lab: Lab, report: dict[str, Any]) -> None:
    found = lab.bucket().list_objects_v2(Bucket=BUCKET, Prefix=f"runs/{servers.MLFLOW_ARTIFACTS}/1/")["Contents"]
    assert f"{report['mlflow_run_ids']['train']}/artifacts/manifest.json" in str(found)
    run = MlflowClient(lab.mlflow).get_run(report["mlflow_run_ids"]["train"])
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/1/")
    assert list(lab.folder.rglob(servers.MLFLOW_ARTIFACTS)) == []


def test_without_a_password_nobody_is_answered(
    lab: Lab, people: None, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = report["mlflow_run_ids"]["train"]
    paths = ("/", "/version", "/api/2.0/mlflow/experiments/search?max_results=1", "/signup")
    artifact = f"/api/2.0/mlflow-artifacts/artifacts/1/{run}/artifacts/manifest.json"
    for path in (*paths, artifact, f"/get-artifact?path=manifest.json&run_uuid={run}"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{lab.mlflow}{path}", timeout=180)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        send(lab.prefect, "/admin/settings")
    for user, password in (("ada", FIRST), ("ada", BOB), ("nobody", ADA), ("admin", "password1234")):
        log_in(monkeypatch, user, password)
        with pytest.raises(MlflowException, match="not authenticated"):
            MlflowClient(lab.mlflow).search_experiments()
    log_in(monkeypatch, "bob", BOB)
    with pytest.raises(MlflowException, match="Permission denied"):
        AuthServiceClient(lab.mlflow).update_user_password("ada", "bob-was-here-now")
    with pytest.raises(MlflowException, match="Permission denied"):
        AuthServiceClient(lab.mlflow).create_user("eve", "bob-was-here-now")


def test_a_command_with_a_wrong_password_says_so(lab: Lab, people: None) -> None:
    doctor = lab.run("ada", FIRST, "doctor", "--only", "prefect", "--only", "mlflow", "--json")
    findings = [json.loads(line) for line in doctor.stdout.splitlines()]
    assert [(found["check"], found["state"]) for found in findings] == [("prefect", "ok"), ("mlflow", "failed")]
    assert "MLFLOW_TRACKING_USERNAME" in findings[1]["to_do"]
    doctor = lab.run("ada", ADA, "doctor", "--only", "prefect", "--only", "mlflow", "--json")
    assert [json.loads(line)["state"] for line in doctor.stdout.splitlines()] == ["ok", "ok"]


PAGE = {"Origin": "http://elsewhere.example"}


def asked(address: str, path: str, headers: dict[str, str], body: bytes | None = None) -> int:
    """The status of an answer."""
    request = urllib.request.Request(f"{address}{path}", body, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=180) as answer:
            assert "Access-Control-Allow-Origin" not in answer.headers
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_page_of_another_origin_gets_in_nowhere(lab: Lab, people: None) -> None:
    """Even with the password that a browser remembers for the server."""
    mlflow = {"Authorization": f"Basic {base64.b64encode(f'admin:{ADMIN}'.encode()).decode()}"}
    create = "/api/2.0/mlflow/experiments/create", b'{"name": "of another page"}'
    assert asked(lab.mlflow, create[0], mlflow | PAGE, create[1]) == 403
    assert asked(lab.mlflow, create[0], mlflow | {"Host": "elsewhere.example"}, create[1]) == 403
    assert asked(lab.mlflow, create[0], mlflow | {"Origin": lab.mlflow}, b"{}") == 400  # which is its own page
    with pytest.raises(urllib.error.HTTPError, match="403"):
        send(lab.prefect, "/flows/filter", {}, PAGE)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        send(lab.prefect, "/csrf-token?client=page", None, PAGE)
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    request = urllib.request.Request(f"{lab.prefect}/api/flows/filter", headers=PAGE | preflight, method="OPTIONS")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=180)


def test_passwords_are_in_no_file_process_run_or_manifest(lab: Lab, report: dict[str, Any]) -> None:
    secrets = [DATABASE_PASSWORD, PREFECT, PREFECT.partition(":")[2], ADMIN, FIRST, ADA, BOB, SECRET]
    family = psutil.Process(lab.process.pid).children(recursive=True)
    said = [" ".join(process.cmdline()) for process in (psutil.Process(lab.process.pid), *family)]
    assert len(said) >= 4
    noted = lab.folder / "runs" / servers.SERVERS  # which its owner alone can read
    assert noted.stat().st_mode & 0o777 == 0o600
    said += [path.read_text(errors="replace") for path in lab.folder.rglob("*") if path.is_file() and path != noted]
    said += [json.dumps(call(lab.prefect, "/admin/settings", password=PREFECT)), lab.said]
    for name in ("prefect", "mlflow"):
        tables = lab.postgres.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", name)
        for (table,) in tables:
            said.append(str(lab.postgres.execute(f'SELECT * FROM "{table}"', name)))
    for stage in report["stages"]:
        key = stage["manifest"].removeprefix(f"s3://{BUCKET}/")
        said.append(lab.bucket().get_object(Bucket=BUCKET, Key=key)["Body"].read().decode())
    for secret in secrets:
        assert not any(secret in text for text in said), secret


def test_a_restart_keeps_people_and_runs(lab: Lab, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    family = psutil.Process(lab.process.pid).children(recursive=True)
    assert lab.stop() == 130
    _, alive = psutil.wait_procs(family, timeout=180)
    assert alive == []
    lab.start()
    log_in(monkeypatch, "ada", ADA)
    assert MlflowClient(lab.mlflow).get_run(report["mlflow_run_ids"]["pipeline"]).info.status == "FINISHED"
    assert len(call(lab.prefect, "/flow_runs/filter", {}, PREFECT)) == len(STAGES) + 1


@pytest.fixture
def login_of_admin_changed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The administrator has another password than the first one, and `up` is told so by the usual variables."""
    AuthServiceClient(lab.mlflow).update_user_password("admin", f"new {ADMIN}", current_password=ADMIN)
    lab.stop()
    log_in(monkeypatch, "admin", f"new {ADMIN}")
    lab.start()
    yield
    AuthServiceClient(lab.mlflow).update_user_password("admin", ADMIN, current_password=f"new {ADMIN}")


@pytest.mark.usefixtures("login_of_admin_changed")
def test_commands_on_the_machine_of_up_need_no_variables(lab: Lab, report: dict[str, Any], digits: Path) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING_")}
    command = ditflow(*arguments("run", ROOT, digits, "--set", "train.held_out=null"))
    again = subprocess.run(command, cwd=lab.folder, env=plain | lab.store, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "MLflow" not in again.stderr
    assert json.loads(again.stdout)["mlflow_run_ids"] == report["mlflow_run_ids"]
    assert not (lab.folder / "runs" / servers.MLFLOW_DATABASE).exists()


def test_an_old_first_password_is_named(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    AuthServiceClient(lab.mlflow).update_user_password("admin", f"new {ADMIN}", current_password=ADMIN)
    lab.stop()
    given = {POSTGRES: lab.postgres.url, PREFECT_PASSWORD: PREFECT, MLFLOW_PASSWORD: ADMIN}
    command = ditflow("up", "--servers-only", "--root", str(lab.folder / "other"), "--prefect-port")
    env = os.environ | given
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        env.pop(name)
    ports = [str(servers.free_port()), "--mlflow-port", str(servers.free_port())]
    refused = subprocess.run([*command, *ports], env=env, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    line = refused.stderr.splitlines()[-1]
    assert line.startswith("error: MLflow does not let admin in (http://127.0.0.1:")
    remedy = "counts for a new one alone: give MLFLOW_TRACKING_USERNAME and _PASSWORD"
    assert line.endswith(f"authenticate.')); {MLFLOW_PASSWORD} {remedy}")  # MLflow's own words, and the remedy
    log_in(monkeypatch, "admin", f"new {ADMIN}")
    lab.start()
