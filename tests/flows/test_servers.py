"""Servers come up, go down with us, and are found again only where they are."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
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
from flows.command.main import main
from storage.errors import DitflowError


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test sets in the environment outlives it."""
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_URI", *LOGIN):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


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
        prefect = stack.enter_context(servers.prefect_server(root / "prefect", password=PASSWORD)).address
        mlflow = stack.enter_context(servers.mlflow_server(root)).address
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
    with servers.announced(str(root), prefect, mlflow, PASSWORD):
        assert (root / servers.SERVERS).stat().st_mode & 0o777 == 0o600
        assert servers.use_running(str(root))
        assert os.environ["PREFECT_API_URL"] == f"{prefect}/api"
        assert os.environ["PREFECT_API_AUTH_STRING"] == PASSWORD
        assert os.environ["MLFLOW_TRACKING_URI"] == mlflow
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")  # what the user set goes before
        monkeypatch.setenv("http_proxy", dead_address())  # and a proxy has no part in it
        assert servers.use_running(str(root))
        assert os.environ["MLFLOW_TRACKING_URI"] == "sqlite:///mine.db"
    assert not (root / servers.SERVERS).exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with servers.announced(str(root), prefect, dead_address(), PASSWORD):  # MLflow is gone: its database is used itself
        assert servers.use_running(str(root))
        assert "MLFLOW_TRACKING_URI" not in os.environ
    with servers.announced(str(root), prefect, mlflow, PASSWORD, login=("ada", "of-ada")):
        assert servers.use_running(str(root))
        assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("ada", "of-ada")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere.example")  # which is not told the password
    with servers.announced(str(root), prefect, mlflow, PASSWORD, login=("ada", "of-ada")):
        assert servers.use_running(str(root))
        assert "MLFLOW_TRACKING_PASSWORD" not in os.environ
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with servers.announced(str(root), prefect, dead_address(), PASSWORD, shared=True):  # Postgres: there is no file
        assert servers.use_running(str(root))
        assert "MLFLOW_TRACKING_URI" in os.environ


def test_commands_use_a_shared_mlflow_even_without_a_flow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address, arguments = dead_address(), ["ls", "--root", str(tmp_path)]
    with servers.announced(str(tmp_path), "", address, PASSWORD, login=("ada", "of-ada")):
        assert main(arguments) == 0
        assert "MLFLOW_TRACKING_URI" not in os.environ  # its runs are in the root's file
    with servers.announced(str(tmp_path), "", address, PASSWORD, login=("ada", "of-ada"), shared=True):
        assert main(arguments) == 0
        assert os.environ["MLFLOW_TRACKING_URI"] == address
        assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("ada", "of-ada")
        os.environ |= {"MLFLOW_TRACKING_URI": "sqlite:///mine.db"}  # what the user set goes before
        assert main(arguments) == 0
        assert os.environ["MLFLOW_TRACKING_URI"] == "sqlite:///mine.db"
    assert capsys.readouterr().out == ""


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


def test_a_half_migrated_prefect_database_is_named(tmp_path: Path, prefect_template: Path) -> None:
    """As two servers of earlier versions left it, that migrated it at once."""
    shutil.copy(prefect_template, tmp_path)
    with closing(sqlite3.connect(tmp_path / "prefect.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = '9725c1cbee35'")
        database.commit()
    remedy = r"\(.*\); if its database is damaged, move .*/prefect\.db away; its log is .*/prefect-server\.log$"
    with pytest.raises(DitflowError, match=rf"^prefect-server ended with code 3 before it answered {remedy}"):
        servers.prefect_server(tmp_path, password=PASSWORD).__enter__()


@pytest.mark.full
def test_what_a_killed_launcher_leaves_is_ended(tmp_path: Path, migrated: Callable[[Path], None]) -> None:
    migrated(tmp_path)
    before = set(descendants())
    with servers.mlflow_server(tmp_path) as server:
        pids = set(descendants()) - before
        assert len(pids) == 2  # of MLflow and of uvicorn, which keeps the port
        assert not server.has_ended
        assert server.listens
        server.process.kill()
        until(lambda: server.has_ended)
    until(lambda: all_gone(pids))
    until(lambda: not server.listens)


SERVE = """
import sys
from pathlib import Path
from flows import servers
with servers.prefect_server(Path(sys.argv[1]), password="of:this"):
    print("up", flush=True)
"""


@pytest.mark.full
def test_servers_that_start_at_once_make_one_database(tmp_path: Path) -> None:
    with ExitStack() as stack:
        starting = [stack.enter_context(start(SERVE, tmp_path)) for _ in range(4)]
        assert [process.communicate()[0] for process in starting] == ["up\n"] * 4
    assert schema(tmp_path)


def schema(home: Path) -> tuple[list[str], str]:
    """Tables and indexes of a Prefect database, and the last migration."""
    with closing(sqlite3.connect(home / "prefect.db")) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master ORDER BY name")]
        return names, str(database.execute("SELECT version_num FROM alembic_version").fetchall())


@pytest.mark.full
def test_killed_while_it_is_migrated_prefects_database_is_made_whole(tmp_path: Path, prefect_template: Path) -> None:
    """Killed again and again, each time a little later; the next command does not wait for the server to end."""
    for tables in (1, 60, 100, 120):
        with start(SERVE, tmp_path) as command:
            until(lambda count=tables: made(tmp_path) >= count)
            command.kill()
    with start(SERVE, tmp_path) as command:
        assert command.communicate()[0] == "up\n"
    assert schema(tmp_path) == schema(prefect_template.parent)


def made(home: Path) -> int:
    """How many tables and indexes are there."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{home}/prefect.db?mode=ro", uri=True)) as database:
        return int(database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    return 0


def test_a_server_that_cannot_start_names_its_database_and_its_log(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    before = set(descendants())
    remedy = r"\(file is not a database\); if its database is damaged, move .*/mlflow\.db away; its log is (.*)$"
    with pytest.raises(DitflowError, match=rf"^mlflow-server ended with code \d+ .*{remedy}") as failure:
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


@contextmanager
def noted(root: Path, text: str) -> Iterator[None]:
    """What a command that lives has announced, with another text."""
    with servers.announced(str(root), "", "", ""):
        (root / servers.SERVERS).write_text(text)
        yield


NOTE = {"host": socket.gethostname(), "prefect": "DEAD", "mlflow": "DEAD", "password": "p"}
NOTE |= {"mlflow_user": "", "mlflow_password": "", "shared": ""}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", *(json.dumps(NOTE | bad) for bad in ({}, {"prefect": "no address"}, {"prefect": None}))],
)
def test_a_broken_note_is_ignored(text: str, tmp_path: Path) -> None:
    assert servers.use_running(str(tmp_path)) is False
    with noted(tmp_path, text.replace("DEAD", dead_address())):
        assert servers.use_running(str(tmp_path)) is False
    assert "PREFECT_API_URL" not in os.environ


ANNOUNCE = """
import sys
from flows import servers
with servers.announced(sys.argv[1], sys.argv[2], "", "of:this"):
    print("announced", flush=True)
    sys.stdin.read()
"""


def test_the_password_of_a_killed_command_goes_to_nobody(tmp_path: Path, prefect: str) -> None:
    """Its process id may be that of another process by now, and a server of someone else's may have taken the port."""
    with start(ANNOUNCE, tmp_path, prefect) as announcing:
        assert announcing.stdout is not None
        assert announcing.stdout.readline() == "announced\n"
        assert servers.running(str(tmp_path)) == NOTE | {"prefect": prefect, "mlflow": "", "password": "of:this"}
        announcing.kill()
    note = json.loads((tmp_path / servers.SERVERS).read_text())
    (tmp_path / servers.SERVERS).write_text(json.dumps(note | {"pid": os.getpid()}))
    assert servers.running(str(tmp_path)) is None
    assert servers.use_running(str(tmp_path)) is False
    assert "PREFECT_API_AUTH_STRING" not in os.environ


def test_what_another_machine_announces_is_not_looked_for_here(tmp_path: Path, prefect: str) -> None:
    with noted(tmp_path, json.dumps(NOTE | {"prefect": prefect})):
        assert servers.use_running(str(tmp_path)) is True
    with noted(tmp_path, json.dumps(NOTE | {"prefect": prefect, "host": "elsewhere"})):
        assert servers.use_running(str(tmp_path)) is False


def test_something_that_does_not_speak_http_is_no_server(tmp_path: Path) -> None:
    def greet() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"220 mail ready\r\n")

    with socket.create_server((servers.HOST, 0)) as listener:
        greeter = Thread(target=greet)
        greeter.start()
        with servers.announced(str(tmp_path), f"http://{servers.HOST}:{listener.getsockname()[1]}", "", "p"):
            assert servers.use_running(str(tmp_path)) is False
        greeter.join()


def test_the_home_of_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert servers.local_home("there") == tmp_path / "there"
    assert servers.local_home("memory://root") == tmp_path / "runs"
