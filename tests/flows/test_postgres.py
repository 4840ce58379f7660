"""Prefect and MLflow over a real Postgres: kills while they make their tables, and eight pipelines at once."""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from faults import all_gone, descendants, start
from mlflow import MlflowClient
from mlflow.entities import Run
from pipelines import STAGES, arguments, ditflow
from postgres_server import PostgresServer, postgres_server, reason_not_to
from prefect_rest import PASSWORD
from until import until

from flows import servers
from flows.access import HOST, POSTGRES, Access, given_access

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(reason_not_to() is not None, reason=str(reason_not_to())),
]
FLOWS = 8
OWN = ("train", "sample", "evaluate", "register")
"""Stages that no two of them share."""


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


@pytest.fixture
def postgres(server: PostgresServer) -> PostgresServer:
    server.create_databases()
    return server


@pytest.fixture
def access(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Access:
    monkeypatch.setenv(POSTGRES, postgres.url)
    return given_access(HOST, PASSWORD)


@pytest.fixture
def both(tmp_path: Path, access: Access) -> Iterator["Both"]:
    both = Both(tmp_path / "home", access)
    both.start()
    yield both
    both.stop()


@pytest.fixture
def pipelines(tmp_path: Path, digits: Path, both: "Both") -> Iterator[list["Pipeline"]]:
    root = tmp_path / "root"
    root.mkdir()
    started = [Pipeline(seed, root, digits, both.env) for seed in range(FLOWS)]
    yield started
    for pipeline in started:
        pipeline.process.kill()
        pipeline.process.wait()


class Both:
    """Prefect's and MLflow's server, which can be killed and started again at the same addresses."""

    def __init__(self, home: Path, access: Access) -> None:
        self._home, self._access, self._stack = home, access, ExitStack()
        self._ports, self._mine = (servers.free_port(), servers.free_port()), set[int]()
        (home / "prefect").mkdir(parents=True)

    def start(self) -> None:
        before = set(descendants())
        prefect, mlflow = self._ports
        serve = servers.prefect_server(
            self._home / "prefect", prefect, password=PASSWORD, scheduler=True, access=self._access
        )
        self._stack.enter_context(serve)
        artifacts = (self._home / servers.MLFLOW_ARTIFACTS).as_uri()
        self._stack.enter_context(servers.mlflow_server(self._home, mlflow, access=self._access, artifacts=artifacts))
        self._mine = set(descendants()) - before

    def kill(self) -> None:
        for pid in self._mine:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(pid, signal.SIGKILL)
        until(lambda: all_gone(self._mine))
        self._stack.close()

    def stop(self) -> None:
        self._stack.close()

    @property
    def env(self) -> dict[str, str]:
        prefect, mlflow = (f"http://{HOST}:{port}" for port in self._ports)
        return {
            "PREFECT_API_URL": f"{prefect}/api",
            "PREFECT_API_AUTH_STRING": PASSWORD,
            "MLFLOW_TRACKING_URI": mlflow,
        }


class Pipeline:
    """One of several that differ in their seeds, and so share shards and latents."""

    def __init__(self, seed: int, root: Path, digits: Path, env: dict[str, str]) -> None:
        sets = ("--set", "train.held_out=null", "--set", f"train.seed={seed}")
        self._command = ditflow(*arguments("run", root, digits, *sets))
        self._env, self._log = os.environ | env, root / f"{seed}.log"
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, env=self._env, stdout=subprocess.PIPE, stderr=log)

    def finish(self) -> dict[str, str]:
        """The state of each stage. A command that a fault has ended is given again, as it asks for."""
        output, _ = self.process.communicate()
        for _ in range(2):
            if self.process.returncode != 0:
                self.start()
                output, _ = self.process.communicate()
        assert self.process.returncode == 0, self._log.read_text()
        return {stage["name"]: stage["state"] for stage in json.loads(output)["stages"]}


def test_eight_pipelines_at_once_lose_nothing(
    tmp_path: Path, postgres: PostgresServer, both: Both, pipelines: list[Pipeline]
) -> None:
    """Two of them are killed, and Postgres and both servers, and all are started again."""
    root = tmp_path / "root"
    while committed(root) < 6:  # two checkpoints behind shards and latents, or more; however long that takes
        assert any(pipeline.process.poll() is None for pipeline in pipelines)
        time.sleep(0.1)
    for killed in pipelines[:2]:
        killed.process.kill()
        killed.process.communicate()
    postgres.kill()
    both.kill()
    postgres.start()
    both.start()
    for killed in pipelines[:2]:
        killed.start()
    assert [set(pipeline.finish()) for pipeline in pipelines] == FLOWS * [set(STAGES)]

    states = {state for (state,) in postgres.execute("SELECT DISTINCT state_type::text FROM flow_run", "prefect")}
    assert "COMPLETED" in states
    assert states <= {"COMPLETED", "CRASHED", "FAILED"}
    client = MlflowClient(both.env["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([client.get_experiment_by_name("ditflow").experiment_id])
    assert "RUNNING" not in {run.info.status for run in runs}
    finished = [run for run in runs if run.info.status == "FINISHED"]
    made = Counter(stage for stage, _ in {(run.data.tags["ditflow.stage"], identity(run)) for run in finished})
    assert made == {"pipeline": FLOWS, "shard": 1, "encode": 1} | dict.fromkeys(OWN, FLOWS)
    for run in finished:
        if run.data.tags["ditflow.stage"] == "train":
            losses = client.get_metric_history(run.info.run_id, "loss")
            assert sorted(metric.step for metric in losses) == [5, 10, 15, 20, 25, 30]
            assert "manifest.json" in [entry.path for entry in client.list_artifacts(run.info.run_id)]
    versions = client.search_model_versions()
    assert len(versions) == len({version.tags["digest.checkpoint"] for version in versions}) == FLOWS
    assert list((root / "running").iterdir()) == []


def identity(run: Run) -> str:
    """The same for all attempts: the digest of an output, or the id of a pipeline."""
    return str(run.data.tags.get("ditflow.digest") or run.data.tags["ditflow.pipeline_id"])


def committed(root: Path) -> int:
    """How many checkpoints and outputs are complete."""
    return len([*root.glob("train/*/checkpoints/step-*/record.json"), *root.glob("*/*/manifest.json")])


SERVE = """
import sys
from pathlib import Path
from flows import servers
from flows.access import HOST, given_access
access, home = given_access(HOST, "of:this"), Path(sys.argv[1])
serve = {
    "prefect": lambda: servers.prefect_server(home, password="of:this", access=access),
    "mlflow": lambda: servers.mlflow_server(home, access=access, artifacts=(home / "artifacts").as_uri()),
}
with serve[sys.argv[2]]():
    print("up", flush=True)
"""


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_killed_while_it_makes_its_tables_a_server_makes_them_whole(
    name: str, tmp_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POSTGRES, postgres.url)
    for tables in (1, 10, 25):
        with start(SERVE, tmp_path, name) as command:
            until(lambda count=tables: made(postgres, name) >= count)
            for pid in [command.pid, *descendants(command.pid)]:
                os.kill(pid, signal.SIGKILL)
    with start(SERVE, tmp_path, name) as command:
        assert command.communicate()[0] == "up\n"
    whole = schema(postgres, name)
    postgres.create_databases()
    with start(SERVE, tmp_path, name) as command:
        assert command.communicate()[0] == "up\n"
    assert schema(postgres, name) == whole


def made(postgres: PostgresServer, name: str) -> int:
    """How many tables and indexes are there, or are being made in a transaction that is not committed."""
    there = "SELECT count(*) FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = 'public'"
    making = f"""SELECT count(DISTINCT relation) FROM pg_locks JOIN pg_database d ON d.oid = database
        WHERE datname = '{name}' AND mode = 'AccessExclusiveLock'"""
    return int(str(postgres.execute(there, name)[0][0])) + int(str(postgres.execute(making, name)[0][0]))


def schema(postgres: PostgresServer, name: str) -> list[tuple[object, ...]]:
    """Columns and indexes, and the last migration."""
    columns = "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'public'"
    indexes = "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
    found = [*postgres.execute(columns, name), *postgres.execute(indexes, name)]
    return sorted(found, key=str) + postgres.execute("SELECT * FROM alembic_version", name)
