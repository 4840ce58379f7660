"""Servers come up, go down with us, and are found again only where they are."""

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from faults import all_gone, dead_address, descendants, start
from pipelines import ODD
from prefect_rest import PASSWORD, call, send
from until import until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from flows import servers
from storage.errors import DitflowError


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test sets in the environment outlives it."""
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=180) as answer:
        return bytes(answer.read())


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def test_servers_are_up_in_the_block_and_gone_after(
    tmp_path: Path, migrated: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / ODD
    migrated(root)
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{tmp_path}/of-the-user.db")
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "of:another-server")
    before = set(descendants())
    with ExitStack() as stack:
        prefect = stack.enter_context(servers.prefect_server(root / "prefect", password=PASSWORD))
        mlflow = stack.enter_context(servers.mlflow_server(root))
        assert json.loads(get(f"{prefect}/api/health")) is True
        assert get(f"{mlflow}/health") == b"OK"
        assert call(prefect, "/flows/filter", {"limit": 1}) == []
        assert (root / "prefect" / "prefect.db").is_file()
        assert list(tmp_path.iterdir()) == [root]
        mine = set(descendants()) - before
        assert len(mine) >= 2
        _use_what_is_announced(tmp_path, prefect, mlflow, monkeypatch)
    until(lambda: all_gone(mine))
    assert servers.is_free(port_of(prefect))
    assert servers.is_free(port_of(mlflow))


def _use_what_is_announced(root: Path, prefect: str, mlflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    note = servers.announce(str(root), prefect, mlflow, PASSWORD)
    assert note.stat().st_mode & 0o777 == 0o600
    assert servers.use_running(str(root))
    assert os.environ["PREFECT_API_URL"] == f"{prefect}/api"
    assert os.environ["PREFECT_API_AUTH_STRING"] == PASSWORD
    assert os.environ["MLFLOW_TRACKING_URI"] == mlflow
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")  # what the user set goes before
    monkeypatch.setenv("http_proxy", dead_address())  # and a proxy has no part in it
    assert servers.use_running(str(root))
    assert os.environ["MLFLOW_TRACKING_URI"] == "sqlite:///mine.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    servers.announce(str(root), prefect, dead_address(), PASSWORD)  # MLflow alone is gone: its database is used itself
    assert servers.use_running(str(root))
    assert "MLFLOW_TRACKING_URI" not in os.environ


PAGE = {"Origin": "http://elsewhere.example", "Host": "elsewhere.example"}
CREATE = {"name": "x", "flow_id": "0" * 8 + "-0000-0000-0000-" + "0" * 12, "pull_steps": [{"run": "touch /tmp/x"}]}


@pytest.mark.parametrize(
    ("path", "body", "headers", "code"),
    [
        ("/flows/filter", {}, {}, 403),  # without a token
        ("/deployments/", CREATE, {}, 403),
        ("/deployments/", CREATE, {"Content-Type": "text/plain"}, 403),  # which browsers send without asking
        ("/deployments/", CREATE, {"Prefect-Csrf-Client": "page", "Prefect-Csrf-Token": "guessed"}, 403),
        ("/csrf-token?client=page", None, {}, 401),
        ("/admin/settings", None, {}, 401),
        ("/admin/settings", None, {"Authorization": "Basic ZGl0ZmxvdzpndWVzc2Vk"}, 401),
    ],
)
def test_a_foreign_page_gets_nothing_of_prefect(
    prefect: str, path: str, body: Any, headers: dict[str, str], code: int
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        send(prefect, path, body, PAGE | headers)
    assert caught.value.code == code
    assert caught.value.headers["Access-Control-Allow-Origin"] in (None, "*")  # in the answer to a wrong token


def test_a_foreign_page_may_not_even_ask(prefect: str) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    request = urllib.request.Request(f"{prefect}/api/deployments/", headers=PAGE | asked, method="OPTIONS")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=180)
    assert caught.value.code == 400
    assert "Access-Control-Allow-Origin" not in caught.value.headers


def test_events_are_not_told_to_a_foreign_page(prefect: str) -> None:
    address = prefect.replace("http://", "ws://") + "/api/events/out"
    with connect(address, origin=Origin(PAGE["Origin"]), subprotocols=[Subprotocol("prefect")]) as socket_:
        socket_.send(json.dumps({"type": "auth", "token": "guessed"}))
        with pytest.raises(ConnectionClosed):
            socket_.recv(timeout=180)


def test_who_knows_the_password_is_answered(prefect: str) -> None:
    assert call(prefect, "/flows/filter", {"limit": 1}) is not None
    with pytest.raises(urllib.error.HTTPError, match="401"):
        call(prefect, "/flows/filter", {"limit": 1}, password="ditflow:guessed")


def test_servers_do_not_outlive_a_killed_command(tmp_path: Path, migrated: Callable[[Path], None]) -> None:
    migrated(tmp_path)
    script = """
import sys, time
from pathlib import Path
from flows import servers
home = Path(sys.argv[1])
with servers.mlflow_server(home), servers.prefect_server(home / "prefect", password="of:this"):
    print("up", flush=True)
    time.sleep(600)
"""
    command = start(script, tmp_path)
    assert command.stdout is not None
    assert command.stdout.readline() == "up\n"
    pids = descendants(command.pid)
    assert len(pids) >= 2
    command.send_signal(signal.SIGKILL)
    command.wait()
    until(lambda: all_gone(pids))


def test_a_server_that_cannot_start_names_its_log(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    before = set(descendants())
    with pytest.raises(DitflowError, match=r"^mlflow-server ended with code \d+ .*; its log is (.*)$") as failure:
        servers.mlflow_server(tmp_path).__enter__()
    log = Path(str(failure.value).rpartition(" ")[2])
    assert log == tmp_path / "mlflow-server.log"
    assert "not a database" in log.read_text()
    until(lambda: all_gone(set(descendants()) - before))


@pytest.mark.parametrize("serve", [partial(servers.prefect_server, password=PASSWORD), servers.mlflow_server])
def test_a_taken_port_is_refused(serve: Callable[..., AbstractContextManager[str]], tmp_path: Path) -> None:
    """Whoever listens there must not be taken for our own server."""
    with socket.create_server((servers.HOST, 0)) as listener:
        port = listener.getsockname()[1]
        assert not servers.is_free(port)
        with pytest.raises(DitflowError, match=f"port {port} of 127.0.0.1 is taken"), serve(tmp_path, port):
            pass
    assert servers.is_free(port)


def test_a_silent_server_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "START_SECONDS", 0)
    before = set(descendants())
    with pytest.raises(DitflowError, match=r"did not answer at http://.* its log is .*mlflow-server\.log$"):
        servers.mlflow_server(tmp_path).__enter__()
    until(lambda: all_gone(set(descendants()) - before))


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "{}",
        '{"pid": "x", "prefect": "a", "mlflow": "b", "password": "p"}',
        '{"pid": PID, "prefect": "no address", "mlflow": "b", "password": "p"}',
        '{"pid": PID, "prefect": null, "mlflow": null, "password": null}',
        '{"pid": PID, "prefect": "DEAD", "mlflow": "DEAD", "password": "p"}',
    ],
)
def test_a_stale_or_broken_note_is_ignored(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        text = text.replace("PID", str(os.getpid())).replace("DEAD", dead_address())
        (tmp_path / servers.SERVERS).write_text(text)
    assert servers.use_running(str(tmp_path)) is False
    assert "PREFECT_API_URL" not in os.environ


def test_another_servers_answer_does_not_make_a_stale_note_good(tmp_path: Path, prefect: str) -> None:
    """The command that wrote it is gone, and a Prefect server of someone else's took the port."""
    departed = start("")
    departed.wait()
    note = {"pid": departed.pid, "prefect": prefect, "mlflow": prefect, "password": PASSWORD}
    (tmp_path / servers.SERVERS).write_text(json.dumps(note))
    assert servers.use_running(str(tmp_path)) is False
    (tmp_path / servers.SERVERS).write_text(json.dumps(note | {"pid": os.getpid()}))
    assert servers.use_running(str(tmp_path)) is True


def test_something_that_does_not_speak_http_is_no_server(tmp_path: Path) -> None:
    def greet() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"220 mail ready\r\n")

    with socket.create_server((servers.HOST, 0)) as listener:
        greeter = Thread(target=greet)
        greeter.start()
        address = f"http://{servers.HOST}:{listener.getsockname()[1]}"
        note = {"pid": os.getpid(), "prefect": address, "mlflow": "", "password": "p"}
        (tmp_path / servers.SERVERS).write_text(json.dumps(note))
        assert servers.use_running(str(tmp_path)) is False
        greeter.join()


def test_the_home_of_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert servers.local_home("there") == tmp_path / "there"
    assert servers.local_home("memory://root") == tmp_path / "runs"
