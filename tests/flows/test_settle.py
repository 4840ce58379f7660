"""Runs that a kill left open are ended, and those of living processes are left alone."""

import errno
import fcntl
import shutil
import socket
from pathlib import Path
from uuid import UUID

import pytest
from faults import start
from mlflow import MlflowClient
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect_rest import call

from flows import processes, settle
from flows.processes import FOLDER
from flows.tracking import runs
from storage.errors import DitflowError

RUNNING = """
import sys, time
from prefect import flow
from prefect.runtime import flow_run
from flows import processes
from flows.tracking import runs

@flow
def endless(root):
    processes.note(flow_run.id, root)
    with runs.pipeline_run(flow_run.id, root) as run_id:
        print(flow_run.id, run_id, flush=True)
        time.sleep(600)

processes.join(sys.argv[1])
endless(sys.argv[1])
"""


class Running:
    """A process that runs a flow."""

    def __init__(self, root: Path) -> None:
        self.process = start(RUNNING, root)
        assert self.process.stdout is not None
        self.flow_run, self.run = self.process.stdout.readline().split()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def client(root: Path) -> MlflowClient:
    return MlflowClient(runs.tracking_uri(str(root)))


def state(address: str, flow_run: str) -> str:
    return str(call(address, f"/flow_runs/{flow_run}")["state"]["type"])


def names(root: Path) -> list[str]:
    return [path.name for path in (root / FOLDER).iterdir()]


def test_what_a_kill_left_is_ended_and_what_lives_is_not(root: Path, client: MlflowClient, prefect_api: str) -> None:
    killed, living = Running(root), Running(root)
    killed.kill()
    for _ in range(2):
        with settle.settled(str(root), alone=False):
            assert len(names(root)) == 2
            assert [state(prefect_api, each.flow_run) for each in (killed, living)] == ["CRASHED", "RUNNING"]
            assert [client.get_run(each.run).info.status for each in (killed, living)] == ["KILLED", "RUNNING"]
    living.kill()
    settle.settle(str(root), alone=False)
    assert (state(prefect_api, living.flow_run), client.get_run(living.run).info.status) == ("CRASHED", "KILLED")
    assert names(root) == []


def test_a_run_that_another_process_has_taken_up_is_its_own(root: Path, client: MlflowClient, prefect_api: str) -> None:
    killed = Running(root)
    killed.kill()
    with runs.pipeline_run(killed.flow_run, str(root)) as run_id:
        assert run_id == killed.run
        settle.settle(str(root), alone=False)
        assert client.get_run(killed.run).info.status == "RUNNING"
    assert client.get_run(killed.run).info.status == "FINISHED"
    processes.leave(str(root))


@pytest.mark.full
def test_what_a_person_was_cancelling_is_cancelled(root: Path, prefect_api: str) -> None:
    killed = Running(root)
    killed.kill()
    call(prefect_api, f"/flow_runs/{killed.flow_run}/set_state", {"state": {"type": "CANCELLING"}})
    settle.settle(str(root), alone=False)
    assert state(prefect_api, killed.flow_run) == "CANCELLED"


@pytest.mark.full
def test_a_process_of_another_machine_is_left_alone(root: Path, client: MlflowClient, prefect_api: str) -> None:
    killed = Running(root)
    killed.kill()
    (path,) = (root / FOLDER).iterdir()
    elsewhere = path.rename(path.with_name(path.name.replace(socket.gethostname(), "elsewhere")))
    settle.settle(str(root), alone=False)
    assert (state(prefect_api, killed.flow_run), client.get_run(killed.run).info.status) == ("RUNNING", "RUNNING")
    assert elsewhere.exists()


@pytest.mark.full
def test_runs_of_no_known_process_are_ended_if_nobody_else_lives(root: Path, prefect_api: str) -> None:
    stray = Running(root)
    stray.kill()
    shutil.rmtree(root / FOLDER)
    living = Running(root)
    settle.settle(str(root), alone=True)
    assert [state(prefect_api, each.flow_run) for each in (stray, living)] == ["RUNNING", "RUNNING"]
    living.kill()
    settle.settle(str(root), alone=True)
    assert [state(prefect_api, each.flow_run) for each in (stray, living)] == ["CRASHED", "CRASHED"]


@flow
def deleted() -> None:
    with get_client(sync_client=True) as client:
        client.delete_flow_run(UUID(str(flow_run.id)))


def test_a_flow_run_that_a_person_deletes_is_named(root: Path, prefect_api: str) -> None:
    said = "Prefect: .* was deleted while it ran; run the same command again"
    with pytest.raises(DitflowError, match=said), settle.settled(str(root), alone=False):
        deleted()
    assert names(root) == []


@pytest.mark.full
def test_without_servers_it_is_left_for_later(
    root: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed = Running(root)
    killed.kill()
    with monkeypatch.context() as away:
        away.setattr(runs, "open_client", lambda _: (_ for _ in ()).throw(ConnectionError("away")))
        settle.settle(str(root), alone=False)
    assert "cannot be settled now: ConnectionError: away" in caplog.text
    assert len(names(root)) == 1
    settle.settle(str(root), alone=False)
    assert names(root) == []


@pytest.mark.full
def test_where_locks_do_not_work_nobody_is_taken_for_killed(
    root: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    living = Running(root)
    shutil.rmtree(root / FOLDER)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with settle.settled(str(root), alone=True):
        assert state(prefect_api, living.flow_run) == "RUNNING"
    assert "runs that a kill leaves open will stay so: [Errno 37] No locks available" in caplog.text
    assert names(root) == []
    living.kill()


def test_processes_that_come_and_go_never_take_each_other_for_killed(root: Path) -> None:
    script = """
import sys
from flows import processes
for _ in range(300):
    processes.join(sys.argv[1])
    assert not processes.others(sys.argv[1]).killed
    processes.leave(sys.argv[1])
"""
    running = [start(script, root) for _ in range(4)]
    assert [each.wait() for each in running] == [0] * 4
    assert names(root) == []


def test_a_file_that_another_user_keeps_to_himself_counts_as_living(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / FOLDER / f"{32 * '0'}@elsewhere"
    path.parent.mkdir()
    path.touch()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        assert processes.others(str(root)) == processes.Processes({}, {path: set()})
        patch.setattr(Path, "iterdir", refuse)
        assert processes.others(str(root)) == processes.Processes({}, {})
