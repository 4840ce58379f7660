"""`ditflow up`: everything comes up, every flow is deployed, a stage runs from its form, and Ctrl-C ends it all."""

import itertools
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
from launching import ENDLESS
from pipelines import ODD, arguments
from postgres_server import postgres_server, reason_not_to
from prefect_rest import call
from until import until

from dit.evaluate import MetricsManifest
from flows import servers
from flows.access import POSTGRES
from flows.children import child
from flows.command import up as command
from flows.command.main import main
from flows.command.pools import QUEUES
from flows.demo.digits import write_digits
from flows.recipe import load_recipe
from flows.registry.register import REEVALUATE_LABEL
from storage.errors import DitflowError
from storage.latents import LatentManifest
from storage.rows.cache import locked

REPOSITORY = Path(__file__).parents[3]
STAGES = {"shard", "encode", "train", "average", "sample", "evaluate", "register"}
FLOWS = {*STAGES, "pipeline", "milestones", "reevaluate"}
RECIPES = ["demo", "demo-flow"]

TRAINING = {"steps": 1_000_000, "checkpoint_every": 100, "log_every": 5, "held_out": None}
PAUSE = 0.5  # between two questions to the server, which the worker and the flows use as well
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Up:
    """`ditflow up` on a root, which can be ended and started again."""

    def __init__(self, root: Path, env: dict[str, str] | None = None) -> None:
        self.root, self.api = root, servers.free_port()
        self.mlflow = servers.free_port()
        self._env = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"} | (env or {})
        self.printed = self.start_up()

    def stop(self) -> int:
        """Ctrl-C, unless it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(180)

    def start_up(self) -> str:
        """What it prints until it is up."""
        ports = ["--prefect-port", str(self.api), "--mlflow-port", str(self.mlflow)]
        recipes = ["--recipe", *RECIPES]
        command = [sys.executable, "-m", "flows.command.main", "up", "--root", str(self.root), *ports, *recipes]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, env=self._env, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                return "".join(lines)
        raise AssertionError("".join(lines))

    def call(self, path: str, body: Any = None, method: str | None = None) -> Any:
        password = json.loads((self.root / servers.SERVERS).read_bytes())["password"]
        return call(f"http://127.0.0.1:{self.api}", path, body, password, method)

    def start(self, flow: str, name: str = "", /, **parameters: Any) -> str:
        """Run a flow as its form would, the fields left alone at their filled-in values."""
        deployment = self.call(f"/deployments/name/{flow}/{name or flow}")
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
        printed = running.printed
        assert f"http://127.0.0.1:{running.api}" in printed
        assert f"http://127.0.0.1:{running.mlflow}/#/experiments/1/runs?workflowType=machine_learning\n" in printed
        yield running
    finally:
        running.stop()


@pytest.fixture
def again(up: Up) -> Up:
    """Started again, if an earlier test has ended it."""
    if up.process.poll() is not None:
        up.start_up()
    return up


def test_every_flow_is_deployed_with_a_typed_form(up: Up) -> None:
    deployments = {each["name"]: each for each in up.call("/deployments/filter", {})}
    assert set(deployments) == FLOWS | set(RECIPES)
    for name, deployment in deployments.items():
        schema = deployment["parameter_openapi_schema"]
        assert deployment["entrypoint"].startswith("flows."), name
        assert schema["definitions"] or name in ("pipeline", "milestones")
    for name, process in zip(RECIPES, ("gaussian", "flow"), strict=True):
        assert deployments[name]["tags"] == ["recipe", name, "dit", process]
        assert deployments[name]["parameters"] == {"recipe": name, "root": str(up.root)}
    assert deployments["sample"]["parameters"]["checkpoint"] == "demo"
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
    assert up.call(f"/flow_runs/{shard}")["name"] == f"shard {Path(shards).parent.name[:8]}"
    of_run = {"logs": {"flow_run_id": {"any_": [shard]}}}
    page = f"MLflow run http://127.0.0.1:{up.mlflow}/#/experiments/1/runs/"
    until(lambda: any(log["message"].startswith(page) for log in up.call("/logs/filter", of_run)), PAUSE)
    assert up.end_of(up.start("encode", shards=shards)) == "COMPLETED"
    train, ranks = up.training(up.manifest("encode"))
    up.call(f"/flow_runs/{train}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert up.end_of(train) == "CANCELLED"
    _, alive = psutil.wait_procs(ranks, timeout=180)
    assert alive == []
    assert up.ranks() == []


@pytest.mark.full
def test_the_machine_runs_one_flow_at_a_time_across_all_deployments(up: Up) -> None:
    assert up.call("/work_pools/ditflow")["concurrency_limit"] == 1
    queues = up.call("/work_pools/ditflow/queues/filter", {})
    assert [queue["name"] for queue in sorted(queues, key=lambda each: each["priority"])] == [*QUEUES]
    given: dict[str, Any] = {"archive": {"train": str(up.root / "digits" / "held_out")}}
    runs = [up.start("shard", **given), up.start("evaluate", samples="nowhere"), up.start("shard", **given)]
    assert [up.end_of(run) for run in runs] == ["COMPLETED", "FAILED", "COMPLETED"]
    found = [up.call(f"/flow_runs/{run}") for run in runs]
    times = sorted((run["start_time"], run["end_time"]) for run in found)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(times))


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
def test_a_new_version_starts_its_evaluation_if_its_recipe_asks_for_it(up: Up) -> None:
    def event(name: str, reevaluate: str) -> dict[str, Any]:
        return {
            "id": str(uuid4()),
            "event": "ditflow.model.registered",
            "occurred": datetime.now(UTC).isoformat(),
            "resource": {"prefect.resource.id": f"ditflow.model.{name}", REEVALUATE_LABEL: reevaluate},
            "payload": {"model_name": name, "version": 1},
        }

    up.call("/events", [event("other", "false"), event("mine", "true")])
    of_flow = {"flows": {"name": {"any_": ["reevaluate"]}}}
    until(lambda: bool(up.call("/flow_runs/filter", of_flow)), PAUSE)
    (run,) = up.call("/flow_runs/filter", of_flow)
    assert run["parameters"]["model_name"] == "mine"
    assert up.end_of(run["id"]) == "FAILED"
    assert "Registered Model with name=mine not found" in up.call(f"/flow_runs/{run['id']}")["state"]["message"]


@pytest.mark.parametrize(
    ("flow", "name", "wrong"),
    [
        ("shard", "shard", {"archive": {"train": "x"}, "config": {"images_per_shard": 0}}),
        ("recipe", "demo", {"set": ["train.steps"]}),
        ("recipe", "demo", {"launch": {"kind": "moon"}}),
    ],
)
def test_a_wrong_value_in_the_form_is_refused(up: Up, flow: str, name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        up.start(flow, name, **wrong)
    assert caught.value.code in (409, 422)


@pytest.mark.parametrize(
    ("flow", "name", "wrong", "line"),
    [
        ("recipe", "demo", {"set": ["train.stepz=3"]}, "--set train.stepz=3: train.stepz: no such key; did you mean"),
        ("sample", "sample", {"config": {"count": 3, "labels": {"a": 4}}}, "config: count: 3 images, but the labels"),
        ("evaluate", "evaluate", {"samples": "nosuch"}, "samples: nosuch: neither a recipe with outputs"),
    ],
)
def test_what_the_form_cannot_see_is_one_line_of_the_run(
    up: Up, flow: str, name: str, wrong: dict[str, Any], line: str
) -> None:
    """As on the terminal, without a traceback, and nothing is begun."""
    run = up.start(flow, name, **wrong)
    assert up.end_of(run) == "FAILED"
    message = up.call(f"/flow_runs/{run}")["state"]["message"]
    assert line in message
    assert "\n" not in message

    def errors() -> list[str]:
        logs = up.call("/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}, "level": {"ge_": 40}}})
        return [log["message"] for log in logs]

    until(lambda: any(each.startswith(line) for each in errors()), PAUSE)
    assert not any("Traceback" in each for each in errors())


def test_the_command_joins_the_running_servers(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert servers.use_running(str(up.root))
    assert os.environ["PREFECT_API_URL"] == f"http://127.0.0.1:{up.api}/api"
    assert os.environ["MLFLOW_TRACKING_URI"] == f"http://127.0.0.1:{up.mlflow}"


@pytest.mark.full
def test_a_recipe_is_deployed_while_the_servers_run(up: Up) -> None:
    before = up.call("/deployments/name/sample/sample")["parameters"]
    command = [sys.executable, "-m", "flows.command.main", "deploy", "demo-diffit", "--root", str(up.root)]
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "recipe/demo-diffit\n"
    made = up.call("/deployments/name/recipe/demo-diffit")
    assert made["tags"] == ["recipe", "demo-diffit", "diffit_image", "edm"]
    assert made["parameters"] == {"recipe": "demo-diffit", "root": str(up.root)}
    assert up.call("/deployments/name/sample/sample")["parameters"] == before


def test_deploy_needs_a_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert main(["deploy", "--root", str(tmp_path)]) == 2
    line = "error: deploy: no Prefect server is in use; set PREFECT_API_URL, or run `ditflow up`\n"
    assert capsys.readouterr().err == line


def test_a_taken_port_is_named(
    up: Up, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PREFECT_API_URL", "http://lab/api")
    assert main(["up", "--root", str(tmp_path), "--prefect-port", str(up.api)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "PREFECT_API_URL=http://lab/api is not used: this command starts servers of its own",
        f"error: port {up.api} is taken; choose another with --prefect-port",
    ]


def test_another_up_on_the_root_is_refused(
    up: Up, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["up", "--root", str(up.root)]) == 2
    line = f"error: {up.root}: another `ditflow up` serves this root, on http://127.0.0.1:{up.api}\n"
    assert capsys.readouterr().err == line


def test_another_up_that_has_not_come_far_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    ports = [f"--{server}-port={servers.free_port()}" for server in ("prefect", "mlflow")]
    with locked(tmp_path / "prefect" / "up"):
        assert main(["up", "--root", str(tmp_path), *ports]) == 2
    line = f"error: {tmp_path}: another `ditflow up` starts or ends on this root; wait for it\n"
    assert capsys.readouterr().err == line


def test_a_busy_server_may_refuse_some_connections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused = [True] * 9 + [False] + [True] * 10
    monkeypatch.setattr(servers, "is_free", lambda *_: refused.pop(0))
    monkeypatch.setattr(command.time, "sleep", lambda _: None)
    with child([sys.executable, "-c", "import time; time.sleep(999)"]) as busy:
        server = servers.Server("prefect-server", "http://127.0.0.1:1", busy, tmp_path / "log")
        with pytest.raises(DitflowError, match=r"^prefect-server has stopped; its log is .*log$"):
            command._watch(busy, {}, tmp_path, [server])
    assert refused == []


def test_up_needs_the_project_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["up", "--root", str(tmp_path)]) == 2
    assert "prefect.yaml: no such file here" in capsys.readouterr().err


def test_the_project_file_names_every_flow_by_a_dotted_module() -> None:
    project = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())
    assert {each["name"] for each in project["deployments"]} == {*FLOWS, "demo"}
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


@pytest.mark.full
def test_what_people_set_in_the_ui_survives_a_restart(again: Up) -> None:
    deployment = again.call("/deployments/name/reevaluate/reevaluate")
    (weekly,) = deployment["schedules"]
    again.call(f"/deployments/{deployment['id']}/schedules/{weekly['id']}", {"active": True}, "PATCH")
    mine = {"schedules": [{"schedule": {"interval": 86_400}, "active": True}]}
    again.call(f"/deployments/{deployment['id']}/schedules", mine["schedules"])
    (trigger,) = again.call("/automations/filter", {})
    again.call(f"/automations/{trigger['id']}", {"enabled": False}, "PATCH")
    sample = again.call("/deployments/name/sample/sample")
    set_by_hand = sample["parameters"] | {"config": sample["parameters"]["config"] | {"count": 7}}
    change = {"concurrency_limit": 3, "paused": True, "parameters": set_by_hand}
    again.call(f"/deployments/{sample['id']}", change, "PATCH")
    recipe = again.call("/deployments/name/recipe/demo")
    changed = recipe["parameters"] | {"set": ["train.steps=7"]}
    again.call(f"/deployments/{recipe['id']}", {"parameters": changed, "tags": ["mine"]}, "PATCH")
    again.call("/work_pools/ditflow", {"concurrency_limit": 2}, "PATCH")
    train = again.call("/deployments/name/train/train")
    again.call(f"/deployments/{train['id']}", {"description": "of an earlier version"}, "PATCH")
    again.stop()

    assert "forms    as set in the UI, not by the recipe: sample, recipe/demo\n" in again.start_up()
    after = again.call("/deployments/name/reevaluate/reevaluate")
    assert {each["schedule"].get("cron"): each["active"] for each in after["schedules"]} == {
        "0 3 * * 1": True,
        None: True,
    }
    assert again.call(f"/automations/{trigger['id']}")["enabled"] is False
    after = again.call(f"/deployments/{sample['id']}")
    assert (after["global_concurrency_limit"]["limit"], after["paused"]) == (3, True)
    assert after["parameters"] == set_by_hand
    after = again.call(f"/deployments/{recipe['id']}")
    assert (after["parameters"], after["tags"]) == (changed, ["mine"])
    assert again.call("/work_pools/ditflow")["concurrency_limit"] == 2
    after = again.call(f"/deployments/{train['id']}")
    assert after["description"].startswith("Latents to a checkpoint.")
    assert after["parameters"] == train["parameters"]


def told(root: Path, run: str) -> tuple[str, str]:
    """The state of a training in Prefect, and that of its run in MLflow, as their databases say."""
    with sqlite3.connect(root / "prefect" / "prefect.db") as database:
        (prefect,) = database.execute("SELECT state_type FROM flow_run WHERE id = ?", (run,)).fetchone()
    of_run = "SELECT status FROM runs JOIN tags USING (run_uuid) WHERE tags.key = ? AND tags.value = ?"
    with sqlite3.connect(root / "mlflow.db") as database:
        (mlflow,) = database.execute(of_run, ("prefect.flow_run_id", run)).fetchone()
    return prefect, mlflow


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_up_ends_a_run_in_progress(again: Up, how: signal.Signals) -> None:
    """It frees its place among the runs of its deployment, too."""
    run, _ = again.training(again.manifest("encode"))
    family = again.family()
    again.process.send_signal(how)
    if how != signal.SIGKILL:
        assert again.process.stdout is not None
        assert again.process.stdout.readline().startswith("ending flow runs")
        for impatient in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            again.process.send_signal(impatient)
    assert again.process.wait(180) == {signal.SIGTERM: 143}.get(how, -how)
    psutil.wait_procs(family, timeout=180)
    if how == signal.SIGKILL:
        again.start_up()
        assert again.state(run) == "CRASHED"
    assert told(again.root, run) == ("CRASHED", "KILLED")


@pytest.mark.full
@pytest.mark.skipif(reason_not_to() is not None, reason=str(reason_not_to()))
def test_on_postgres_the_end_of_up_ends_its_own_runs_alone(tmp_path: Path, latents: LatentManifest) -> None:
    """Not those of other machines, such as a command that reports to the same server."""
    with postgres_server() as postgres:
        postgres.create_databases()
        shared = Up(tmp_path / "root", {POSTGRES: postgres.url})
        flow = shared.call("/deployments/name/sample/sample")["flow_id"]
        elsewhere = {"flow_id": flow, "state": {"type": "RUNNING", "name": "Running"}}
        other = shared.call("/flow_runs/", elsewhere)["id"]
        config = ENDLESS.model_dump(mode="json") | {"checkpoint_every": 20}
        mine = shared.start("train", latents=latents.uri, config=config)
        until(lambda: shared.saved() > 0, PAUSE)
        assert shared.stop() == 130
        states = dict(postgres.execute("SELECT id::text, state_type::text FROM flow_run", "prefect"))
        assert (states[mine], states[other]) == ("CRASHED", "RUNNING")
        assert postgres.execute("SELECT status FROM runs", "mlflow") == [("KILLED",)]


@pytest.mark.full
@pytest.mark.parametrize("name", ["mlflow server", "uvicorn", "prefect server"])
def test_a_killed_server_ends_everything(again: Up, name: str) -> None:
    """MLflow's own launcher too, which leaves uvicorn behind."""
    family = again.family()
    next(each for each in family if name in " ".join(each.cmdline())).kill()
    assert again.process.wait(180) == 1
    _, alive = psutil.wait_procs(family, timeout=180)
    assert alive == []
    assert servers.is_free(again.api)
    assert servers.is_free(again.mlflow)


@pytest.mark.full
def test_a_killed_worker_ends_everything(again: Up) -> None:
    """Also the flow that it ran, and its ranks: `up` started again begins in order."""
    run, _ = again.training(again.manifest("encode"))
    family = again.family()
    (worker,) = [each for each in family if "worker" in each.cmdline()]
    worker.kill()
    assert again.process.wait(180) == 1
    _, alive = psutil.wait_procs(family, timeout=180)
    assert alive == []
    with sqlite3.connect(next(again.root.rglob("prefect.db"))) as database:
        (state,) = database.execute("SELECT state_type FROM flow_run WHERE id = ?", (run,)).fetchone()
    assert state == "CRASHED"


@pytest.mark.full
def test_milestones_are_evaluated_from_their_form_while_the_pipeline_trains(again: Up, digits: Path) -> None:
    more = ("--set", "train.milestones=15", "--set", "evaluate_milestones.sample.count=20")
    again.call("/work_pools/ditflow", {"concurrency_limit": 1}, "PATCH")
    sets = arguments("run", again.root, digits, *more)
    recipe = load_recipe("demo", sets[sets.index("--set") + 1 :: 2], str(again.root)).model_dump(mode="json")
    alone = again.start("milestones", recipe=recipe)
    until(lambda: again.state(alone) == "RUNNING", PAUSE)
    blocked = again.start("evaluate", samples="nowhere")
    assert again.end_of(alone) == "FAILED"
    assert "gives its place in the work pool ditflow to" in again.call(f"/flow_runs/{alone}")["state"]["message"]
    assert again.end_of(blocked) == "FAILED"
    again.call("/work_pools/ditflow", {"concurrency_limit": 2}, "PATCH")
    following, training = (again.start(flow, recipe=recipe) for flow in ("milestones", "pipeline"))
    assert (again.end_of(following), again.end_of(training)) == ("COMPLETED", "COMPLETED")
    evaluated = [MetricsManifest.read(str(path)) for path in again.root.glob("evaluate/*/manifest.json")]
    assert sorted(each.conditions["training_steps"] for each in evaluated) == [15, 30, 30]  # and the recipe's own
