"""`ditflow up`: everything comes up, every flow is deployed, a stage runs from its form, and Ctrl-C ends it all."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import yaml
from pipelines import ODD, arguments
from prefect_rest import call
from until import until

from dit.evaluate import MetricsManifest
from flows import servers
from flows.children import child
from flows.command import up as command
from flows.command.main import main
from flows.demo.digits import write_digits
from flows.recipe import load_recipe
from storage.errors import DitflowError

REPOSITORY = Path(__file__).parents[3]
STAGES = {"shard", "encode", "train", "average", "sample", "evaluate", "register"}
FLOWS = {*STAGES, "pipeline", "milestones", "reevaluate"}

TRAINING = {"steps": 1_000_000, "checkpoint_every": 100, "log_every": 5, "held_out": None}
PAUSE = 0.5  # between two questions to the server, which the worker and the flows use as well
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Up:
    """A running `ditflow up`."""

    def __init__(self, root: Path) -> None:
        self.root, self.api = root, servers.free_port()
        self.mlflow = servers.free_port()
        ports = ["--prefect-port", str(self.api), "--mlflow-port", str(self.mlflow)]
        command = [sys.executable, "-m", "flows.command.main", "up", "--root", str(root), *ports]
        environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
        self.process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)

    def stop(self) -> int:
        """Ctrl-C, unless it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(180)

    def wait_until_up(self) -> str:
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                return "".join(lines)
        raise AssertionError("".join(lines))

    def call(self, path: str, body: Any = None) -> Any:
        password = json.loads((self.root / servers.SERVERS).read_bytes())["password"]
        return call(f"http://127.0.0.1:{self.api}", path, body, password)

    def start(self, flow: str, **parameters: Any) -> str:
        """Run a flow as its form would, the fields left alone at their filled-in values."""
        deployment = self.call(f"/deployments/name/{flow}/{flow}")
        run = self.call(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})
        return str(run["id"])

    def state(self, run: str) -> str:
        return str(self.call(f"/flow_runs/{run}")["state"]["type"])

    def end_of(self, run: str) -> str:
        until(lambda: self.state(run) in ENDED, PAUSE)
        return self.state(run)

    def manifest(self, stage: str) -> str:
        (manifest,) = (self.root / stage).glob("*/manifest.json")
        return str(manifest)

    def training(self, latents: str) -> tuple[str, list[psutil.Process]]:
        """A flow run on two ranks that has just saved, and its torchrun and ranks."""
        before = self.saved()
        config = self.call("/deployments/name/train/train")["parameters"]["config"] | TRAINING
        run = self.start("train", latents=latents, launcher={"nproc": 2}, config=config)
        of_run = {"artifacts": {"flow_run_id": {"any_": [run]}, "type": {"any_": ["progress"]}}}
        until(lambda: any(found["data"] for found in self.call("/artifacts/filter", of_run)), PAUSE)
        until(lambda: self.saved() > before)
        ranks = self.ranks()
        assert len(ranks) == 3
        return run, ranks

    def saved(self) -> int:
        """The step of the newest checkpoint, as its folder tells."""
        records = self.root.glob("train/*/checkpoints/step-*/record.json")
        return max((int(record.parent.name.rpartition("-")[2]) for record in records), default=0)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        """Of all flow runs, each after its torchrun."""
        return [each for each in self.family() if is_rank(each)]


def is_rank(process: psutil.Process) -> bool:
    try:
        return "flows.launch.worker" in process.cmdline()
    except psutil.Error:  # it ended meanwhile
        return False


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, migrated: Callable[[Path], None]) -> Iterator[Up]:
    root = tmp_path_factory.mktemp("up") / ODD
    migrated(root)
    running = Up(root)
    try:
        printed = running.wait_until_up()
        assert f"http://127.0.0.1:{running.api}" in printed
        assert f"http://127.0.0.1:{running.mlflow}" in printed
        yield running
    finally:
        running.stop()


def test_every_flow_is_deployed_with_a_typed_form(up: Up) -> None:
    deployments = {each["name"]: each for each in up.call("/deployments/filter", {})}
    assert set(deployments) == FLOWS
    for name, deployment in deployments.items():
        schema = deployment["parameter_openapi_schema"]
        assert deployment["entrypoint"].startswith("flows."), name
        assert schema["definitions"] or name in ("pipeline", "milestones")
    config = deployments["train"]["parameter_openapi_schema"]["definitions"]["TrainConfig"]
    assert config["properties"]["steps"]["description"].startswith("Number of optimizer steps.")
    assert config["properties"]["steps"]["minimum"] == 1
    assert config["additionalProperties"] is False
    kinds = {"LocalLaunch", "NodesLaunch", "SlurmLaunch", "KubernetesLaunch"}
    assert kinds <= deployments["train"]["parameter_openapi_schema"]["definitions"].keys()
    (weekly,) = deployments["reevaluate"]["schedules"]
    assert (weekly["schedule"]["cron"], weekly["active"]) == ("0 3 * * 1", False)
    assert deployments["train"]["parameters"]["config"]["steps"] == 1200


@pytest.mark.full
def test_stages_run_on_the_worker_and_a_cancelled_one_ends_its_ranks(up: Up) -> None:
    write_digits(up.root / "digits")
    shard = up.start("shard", archive={"train": str(up.root / "digits" / "held_out")})
    assert up.end_of(shard) == "COMPLETED"
    shards = up.manifest("shard")
    assert json.loads(Path(shards).read_text())["provenance"]["prefect_flow_run_id"] == shard
    artifacts = {each["key"] for each in up.call("/artifacts/filter", {})}
    assert {"shard-mlflow", "shard-manifest", "shard-images"} <= artifacts
    assert up.end_of(up.start("encode", shards=shards)) == "COMPLETED"
    train, ranks = up.training(up.manifest("encode"))
    up.call(f"/flow_runs/{train}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert up.end_of(train) == "CANCELLED"
    _, alive = psutil.wait_procs(ranks, timeout=180)
    assert alive == []
    assert up.ranks() == []


@pytest.mark.full
def test_a_killed_flow_crashes_and_leaves_no_rank(up: Up) -> None:
    train, ranks = up.training(up.manifest("encode"))
    flow = ranks[0].parent()
    assert flow is not None
    flow.kill()
    assert up.end_of(train) == "CRASHED"
    _, alive = psutil.wait_procs(ranks, timeout=180)
    assert alive == []


@pytest.mark.full
def test_a_new_version_starts_its_evaluation(up: Up) -> None:
    event = {
        "id": str(uuid4()),
        "event": "ditflow.model.registered",
        "occurred": datetime.now(UTC).isoformat(),
        "resource": {"prefect.resource.id": "ditflow.model.mine"},
        "payload": {"model_name": "mine", "version": 1},
    }
    up.call("/events", [event])
    of_flow = {"flows": {"name": {"any_": ["reevaluate"]}}}
    until(lambda: bool(up.call("/flow_runs/filter", of_flow)), PAUSE)
    (run,) = up.call("/flow_runs/filter", of_flow)
    assert run["parameters"]["model_name"] == "mine"
    assert up.end_of(run["id"]) == "FAILED"
    assert "Registered Model with name=mine not found" in up.call(f"/flow_runs/{run['id']}")["state"]["message"]


def test_a_wrong_value_in_the_form_is_refused(up: Up) -> None:
    deployment = up.call("/deployments/name/shard/shard")
    wrong = {"parameters": {"archive": {"train": "x"}, "config": {"images_per_shard": 0}}}
    with pytest.raises(urllib.error.HTTPError) as caught:
        up.call(f"/deployments/{deployment['id']}/create_flow_run", wrong)
    assert caught.value.code in (409, 422)


def test_the_command_joins_the_running_servers(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert servers.use_running(str(up.root))
    assert os.environ["PREFECT_API_URL"] == f"http://127.0.0.1:{up.api}/api"
    assert os.environ["MLFLOW_TRACKING_URI"] == f"http://127.0.0.1:{up.mlflow}"


def test_a_taken_port_is_named(
    up: Up, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["up", "--root", str(tmp_path), "--prefect-port", str(up.api)]) == 2
    assert capsys.readouterr().err == f"error: port {up.api} is taken; choose another with --prefect-port\n"


def test_another_up_on_the_root_is_refused(
    up: Up, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["up", "--root", str(up.root)]) == 2
    line = f"error: {up.root}: another `ditflow up` serves this root, on http://127.0.0.1:{up.api}\n"
    assert capsys.readouterr().err == line


def test_a_busy_server_may_refuse_some_connections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused = [True] * 9 + [False] + [True] * 10
    monkeypatch.setattr(servers, "is_free", lambda _: refused.pop(0))
    monkeypatch.setattr(command.time, "sleep", lambda _: None)
    with child([sys.executable, "-c", "import time; time.sleep(999)"]) as busy:
        server = servers.Server("prefect-server", "http://127.0.0.1:1", busy, tmp_path / "log")
        with pytest.raises(DitflowError, match=r"^prefect-server has stopped; its log is .*log$"):
            command._watch(busy, [], "", [server])
    assert refused == []


def test_up_needs_the_project_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["up", "--root", str(tmp_path)]) == 2
    assert "prefect.yaml: no such file here" in capsys.readouterr().err


def test_the_project_file_names_every_flow_by_a_dotted_module() -> None:
    project = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())
    assert {each["name"] for each in project["deployments"]} == FLOWS
    assert all(each["entrypoint"].startswith("flows.") for each in project["deployments"])


def test_ctrl_c_ends_everything(up: Up) -> None:
    family = up.family()
    assert len(family) >= 3
    assert up.stop() == 130
    _, alive = psutil.wait_procs(family, timeout=180)
    assert alive == []
    assert servers.is_free(up.api)
    assert servers.is_free(up.mlflow)
    assert not (up.root / servers.SERVERS).exists()


def told(root: Path, run: str) -> tuple[str, str]:
    """The state of a training in Prefect, and that of its run in MLflow, as their databases say."""
    with sqlite3.connect(root / "prefect" / "prefect.db") as database:
        (prefect,) = database.execute("SELECT state_type FROM flow_run WHERE id = ?", (run,)).fetchone()
    of_run = "SELECT status FROM runs JOIN tags USING (run_uuid) WHERE tags.key = ? AND tags.value = ?"
    with sqlite3.connect(root / "mlflow.db") as database:
        (mlflow,) = database.execute(of_run, ("prefect.flow_run_id", run)).fetchone()
    return prefect, mlflow


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_up_ends_a_run_in_progress(up: Up, how: signal.Signals) -> None:
    """It frees its place among the runs of its deployment, too."""
    up.stop()
    again = Up(up.root)
    again.wait_until_up()
    run, _ = again.training(again.manifest("encode"))
    family = again.family()
    again.process.send_signal(how)
    assert again.process.wait(180) == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(how, -how)
    psutil.wait_procs(family, timeout=180)
    if how == signal.SIGKILL:
        once_more = Up(up.root)
        once_more.wait_until_up()
        assert once_more.state(run) == "CRASHED"
        once_more.stop()
    assert told(up.root, run) == ("CRASHED", "KILLED")


@pytest.mark.full
@pytest.mark.parametrize("name", ["mlflow server", "uvicorn", "prefect server"])
def test_a_killed_server_ends_everything(up: Up, name: str) -> None:
    """MLflow's own launcher too, which leaves uvicorn behind."""
    up.stop()
    again = Up(up.root)
    again.wait_until_up()
    family = again.family()
    next(each for each in family if name in " ".join(each.cmdline())).kill()
    assert again.process.wait(180) == 1
    _, alive = psutil.wait_procs(family, timeout=180)
    assert alive == []
    assert servers.is_free(again.api)
    assert servers.is_free(again.mlflow)


@pytest.mark.full
def test_a_killed_worker_ends_everything(up: Up) -> None:
    """Also the flow that it ran, and its ranks: `up` started again begins in order."""
    up.stop()
    again = Up(up.root)
    again.wait_until_up()
    run, _ = again.training(again.manifest("encode"))
    family = again.family()
    (worker,) = [each for each in family if "worker" in each.cmdline()]
    worker.kill()
    assert again.process.wait(180) == 1
    _, alive = psutil.wait_procs(family, timeout=180)
    assert alive == []
    with sqlite3.connect(next(up.root.rglob("prefect.db"))) as database:
        (state,) = database.execute("SELECT state_type FROM flow_run WHERE id = ?", (run,)).fetchone()
    assert state == "CRASHED"


@pytest.mark.full
def test_milestones_are_evaluated_from_their_form_while_the_pipeline_trains(up: Up, digits: Path) -> None:
    up.stop()
    again = Up(up.root)
    again.wait_until_up()
    more = ("--set", "train.milestones=15", "--set", "evaluate_milestones.sample.count=20")
    sets = arguments("run", up.root, digits, *more)
    recipe = load_recipe("demo", sets[sets.index("--set") + 1 :: 2], str(up.root)).model_dump(mode="json")
    following, training = (again.start(flow, recipe=recipe) for flow in ("milestones", "pipeline"))
    assert (again.end_of(following), again.end_of(training)) == ("COMPLETED", "COMPLETED")
    evaluated = [MetricsManifest.read(str(path)) for path in up.root.glob("evaluate/*/manifest.json")]
    assert sorted(each.conditions["training_steps"] for each in evaluated) == [15, 30, 30]  # and the recipe's own
    again.stop()
