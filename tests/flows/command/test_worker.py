"""`ditflow worker`: work pools with queues, on machines that need nothing but the server's address."""

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import refused
from faults import all_gone
from launching import ENDLESS, write_latents
from pipelines import arguments, ditflow
from prefect_rest import PASSWORD, call
from until import until

from flows import servers

pytestmark = pytest.mark.full
PAUSE = 0.5
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Lab:
    """A Prefect server, and a root that its workers share."""

    def __init__(self, root: Path, address: str) -> None:
        self.root, self.address = root, address
        self.env = os.environ | {"PREFECT_API_URL": f"{address}/api", "PREFECT_API_AUTH_STRING": PASSWORD}

    def worker(self, *more: str, errors: int | None = None) -> "subprocess.Popen[str]":
        """A worker that serves."""
        command = ditflow("worker", "--pool", "gpu", "--root", str(self.root), *more)
        process = subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        assert "Ctrl-C stops.\n" in iter(process.stdout.readline, "")
        return process

    def call(self, path: str, body: Any = None, method: str | None = None) -> Any:
        return call(self.address, path, body, method=method)

    def start(self, deployment: str, queue: str | None = None, **parameters: Any) -> str:
        found = self.call(f"/deployments/name/{deployment}")
        body = {"parameters": parameters, "work_queue_name": queue}
        return str(self.call(f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def state(self, run: str) -> str:
        return str(self.call(f"/flow_runs/{run}")["state"]["type"])

    def ended(self, run: str) -> tuple[str, str]:
        """When a run has begun and ended."""
        until(lambda: self.state(run) in ENDED, PAUSE)
        found = self.call(f"/flow_runs/{run}")
        return found["start_time"], found["end_time"]


@pytest.fixture(scope="module")
def lab(prefect: str, tmp_path_factory: pytest.TempPathFactory, migrated: Callable[[Path], None]) -> Iterator[Lab]:
    root = tmp_path_factory.mktemp("lab") / "root"
    migrated(root)
    yield Lab(root, prefect)


def stop(worker: "subprocess.Popen[str]", how: signal.Signals = signal.SIGINT) -> list[psutil.Process]:
    family = psutil.Process(worker.pid).children(recursive=True)
    worker.send_signal(how)
    assert worker.wait() == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(how, -how)
    until(lambda: all_gone(each.pid for each in family), PAUSE)
    return family


def test_a_recipe_is_submitted_to_a_pool_and_looked_for(lab: Lab, digits: Path) -> None:
    recipe = arguments("run", lab.root, digits, "--pool", "gpu", "--queue", "urgent")
    early = subprocess.run(ditflow(*recipe), env=lab.env, capture_output=True, text=True, check=False)
    assert early.returncode == 2
    assert (
        "error: --pool gpu: nothing is deployed to this pool; start `ditflow worker --pool gpu` first" in early.stderr
    )
    worker = lab.worker()
    try:
        first = subprocess.run(ditflow(*recipe), env=lab.env, capture_output=True, text=True, check=False)
        assert first.returncode == 3
        assert "demo: submitted\n" in first.stderr
        again = subprocess.run(ditflow(*recipe), env=lab.env, capture_output=True, text=True, check=False)
        assert again.returncode in (0, 3)  # it may be done
        of_pool = {"work_pools": {"name": {"any_": ["gpu"]}}}  # other modules' flows ran on this server
        (run,) = lab.call("/flow_runs/filter", of_pool)
        assert (run["work_pool_name"], run["work_queue_name"]) == ("gpu", "urgent")
        until(lambda: lab.state(run["id"]) in ENDED, PAUSE)
        assert lab.state(run["id"]) == "COMPLETED"
        done = subprocess.run(ditflow(*recipe), env=lab.env, capture_output=True, text=True, check=True)
        assert {stage["state"] for stage in json.loads(done.stdout)["stages"]} == {"skipped"}
        other = ditflow(*recipe, "--set", "train.seed=1", "--queue", "x")
        wrong = subprocess.run(other, env=lab.env, capture_output=True, text=True, check=False)
        assert wrong.returncode == 2
        assert "error: --queue x: the pool gpu has urgent, default, background" in wrong.stderr
    finally:
        stop(worker)


def test_a_pool_gets_the_queues_that_it_lacks_and_a_worker_that_is_killed_is_told_with_its_log(lab: Lab) -> None:
    lab.call("/work_pools/", {"name": "half", "type": "process"})
    worker = lab.worker("--pool", "half", errors=subprocess.PIPE)
    queues = lab.call("/work_pools/half/queues/filter", {})
    assert sorted((each["priority"], each["name"]) for each in queues) == [
        (1, "urgent"),
        (2, "default"),
        (3, "background"),
    ]
    (child,) = psutil.Process(worker.pid).children()
    child.kill()
    _, said = worker.communicate()
    assert worker.returncode == 1
    assert f"a worker of Prefect ended with code -9; its log is {lab.root / 'workers' / 'half-'}" in said


def test_queues_go_by_priority_one_flow_at_a_time_and_what_people_set_stays(lab: Lab, digits: Path) -> None:
    stop(lab.worker())
    lab.call("/work_pools/gpu", {"concurrency_limit": 5}, "PATCH")
    shard = {"archive": {"train": str(digits / "train")}}
    order = [lab.start("shard/gpu", queue, **shard) for queue in ("background", "default", "urgent")]
    worker = lab.worker()
    try:
        times = sorted((lab.ended(run), run) for run in order)
    finally:
        stop(worker)
    assert [run for _, run in times] == order[::-1]
    assert all(end <= begin for ((_, end), _), ((begin, _), _) in itertools.pairwise(times))
    assert {lab.state(run) for run in order} == {"COMPLETED"}
    assert lab.call("/work_pools/gpu")["concurrency_limit"] == 5


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_a_worker_ends_its_flow_and_nobody_elses(lab: Lab, how: signal.Signals, tmp_path: Path) -> None:
    latents = write_latents(tmp_path)
    worker, other = lab.worker(), lab.worker()
    config = ENDLESS.model_copy(update={"seed": int(how)}).model_dump(mode="json")
    run, theirs = (
        lab.start("train/gpu", latents=latents.url, config=config | {"steps": n}) for n in (10**6, 10**6 + 1)
    )
    until(lambda: {lab.state(run), lab.state(theirs)} == {"RUNNING"}, PAUSE)
    until(lambda: of(worker) and of(other), PAUSE)
    mine = next(each for each in (run, theirs) if each == of(worker)[0])
    rest = next(each for each in (run, theirs) if each != mine)
    stop(worker, how)
    if how == signal.SIGKILL:
        stop(lab.worker())  # which settles what a kill has left
    until(lambda: lab.state(mine) in ENDED, PAUSE)
    assert lab.state(mine) == "CRASHED"
    assert lab.state(rest) == "RUNNING"
    stop(other)
    assert lab.state(rest) == "CRASHED"


def of(worker: "subprocess.Popen[str]") -> list[str]:
    """The flow runs of a worker."""
    found = []
    for each in psutil.Process(worker.pid).children(recursive=True):
        try:
            found.append(each.environ().get("PREFECT__FLOW_RUN_ID", ""))
        except psutil.Error:  # it has just ended
            continue
    return list(dict.fromkeys(filter(None, found)))


@pytest.mark.parametrize("pool", ["train", "pipeline", "a/b"])
def test_a_name_that_no_pool_can_have_is_refused(root: Path, capsys: pytest.CaptureFixture[str], pool: str) -> None:
    for command in (["worker"], ["run", "demo"]):
        said = refused(capsys, [*command, "--root", str(root), f"--pool={pool}"])
        assert f"--pool {pool}: neither the name of a flow" in said


def test_without_a_server_a_worker_says_what_is_missing(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert "worker: no Prefect server runs; set PREFECT_API_URL" in refused(capsys, ["worker", "--root", str(root)])
    monkeypatch.setenv("PREFECT_API_URL", f"http://{servers.HOST}:{servers.free_port()}/api")
    assert "Prefect does not answer" in refused(capsys, ["worker", "--root", str(root)], code=1)
