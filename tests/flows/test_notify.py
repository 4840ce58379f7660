"""Who is told of what: a real Prefect server, and a web service that keeps what it is sent."""

import json
import shutil
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from faults import prefect_at
from prefect.client.orchestration import get_client
from prefect.flows import Flow
from prefect.states import Crashed, Failed, State
from prefect_rest import PASSWORD
from until import until

from flows import notify, servers
from flows.notify import Settings, read_settings
from flows.pipeline import pipeline
from flows.registry.events import emit
from flows.registry.promotion import tell_promoted
from flows.stages import stage_flow
from storage.errors import InputError

TOKEN = "a-secret-path-of-a-webhook"
RUNS = f"{notify.PREFIX}webhook 0: failed"


class Service:
    """Keeps the messages of each path; answers 500 on a path that ends in ``broken``."""

    def __init__(self) -> None:
        self.messages: dict[str, list[dict[str, str]]] = {}
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.messages.setdefault(self.path, []).append(body)
                self.send_response(500 if self.path.endswith("broken") else 200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    @contextmanager
    def serving(self) -> Iterator[None]:
        thread = threading.Thread(target=self.server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            self.server.shutdown()
            thread.join()

    def subjects(self, path: str = f"/{TOKEN}") -> list[str]:
        return [message["title"] for message in self.messages.get(path, [])]


class PostOffice(socketserver.ThreadingTCPServer):
    """Keeps the mails that it is given."""

    daemon_threads = True

    def __init__(self) -> None:
        self.mails: list[str] = []
        super().__init__(("127.0.0.1", 0), Clerk)


class Clerk(socketserver.StreamRequestHandler):
    """Speaks as much of SMTP (RFC 5321) as a mail needs."""

    server: PostOffice

    def handle(self) -> None:
        self.wfile.write(b"220 ready\r\n")
        for line in self.rfile:
            command = line.split()[0].upper()
            if command == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = iter(self.rfile.readline, b".\r\n")
                self.server.mails.append(b"".join(lines).decode())
            self.wfile.write(b"221 bye\r\n" if command == b"QUIT" else b"250 ok\r\n")


class World:
    """The server, its folder, and the service."""

    def __init__(self, home: Path, address: str, service: Service) -> None:
        self.home, self.address, self.service = home, address, service

    def end(self, flow: Flow[Any, Any], name: str, state: State[Any]) -> None:
        """A flow run that ends so."""
        with get_client(sync_client=True) as client:
            run = client.create_flow_run(flow, name=name)
            client.set_flow_run_state(run.id, state, force=True)

    def automations(self) -> dict[str, Any]:
        with get_client(sync_client=True) as client:
            return {each.name: each for each in client.read_automations()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, prefect_template: Path) -> Iterator[World]:
    home, service = tmp_path_factory.mktemp("prefect"), Service()
    shutil.copy(prefect_template, home)
    with (
        service.serving(),
        pytest.MonkeyPatch.context() as patch,
        servers.prefect_server(home, password=PASSWORD, scheduler=True) as server,
        prefect_at(server.address),
    ):
        patch.setenv("TEAM_WEBHOOK", f"{service.address}/{TOKEN}")
        patch.setenv("BROKEN_WEBHOOK", f"{service.address}/{TOKEN}-broken")
        patch.setenv("SLACK_WEBHOOK", f"https://hooks.slack.com/services/T1234ABCD/B1234ABCD/{TOKEN.replace('-', '')}")
        patch.setenv("LAB_MAIL", f"mailto://me:{TOKEN}@127.0.0.1:9?from=a@example.org&to=b@example.org")
        with get_client(sync_client=True) as client:
            client.create_flow(pipeline)  # as a deployment does
        world = World(home, server.address, service)
        notify.apply(settings({"kind": "webhook", "url_from": "TEAM_WEBHOOK"}))
        yield world


def settings(*notices: dict[str, Any]) -> Settings:
    return Settings.model_validate({"notify": notices})


def test_each_subject_is_told_once_and_a_stage_of_a_pipeline_not_apart(world: World) -> None:
    preempted = "Flow run encountered an exception: PreemptedError: stopped by SIGTERM at step 12; run the same command"
    world.end(stage_flow("train"), "inner train", Failed(message="no images"))
    world.end(pipeline, "one", Failed(message="no images in the archive"))
    world.end(pipeline, "two", Crashed(message="its process was killed"))
    world.end(pipeline, "three", Failed(message=preempted))
    drift = {"version": 3, "metric": "fd", "change": "worse", "then": 1.5, "now": 9, "period": "W47"}
    emit("ditflow.metric.drifted", "digits", drift)
    tell_promoted("digits", 4, "fd 9 -> 1")
    expected = {
        "one failed",
        "two crashed",
        "three was preempted too often",
        "digits 3 drifted",
        "digits 4 is champion",
    }
    until(lambda: expected <= set(world.service.subjects()), 0.2)
    assert sorted(world.service.subjects()) == sorted(expected)
    texts = {message["title"]: message["message"] for message in world.service.messages[f"/{TOKEN}"]}
    assert texts["one failed"].startswith(f"no images in the archive\n{world.address}/runs/flow-run/")
    assert "None" not in texts["one failed"]
    assert "fd is worse: 1.5 -> 9, W47" in texts["digits 3 drifted"]
    assert texts["digits 4 is champion"] == "fd 9 -> 1"


def test_a_run_that_no_worker_takes_is_told(world: World) -> None:
    from prefect.client.schemas.objects import StateType

    world.end(pipeline, "four", State(type=StateType.SCHEDULED, name="Late"))
    until(lambda: "four is late" in world.service.subjects(), 0.2)


def test_what_is_switched_off_stays_off_and_what_is_not_asked_for_goes(world: World) -> None:
    with get_client(sync_client=True) as client:
        client.pause_automation(world.automations()[RUNS].id)
    about = {"about": ["failed", "late"]}
    notify.apply(settings({"kind": "webhook", "url_from": "TEAM_WEBHOOK"} | about))
    found = world.automations()
    assert {name for name in found if name.startswith(notify.PREFIX)} == {RUNS, f"{notify.PREFIX}webhook 0: late"}
    assert not found[RUNS].enabled
    assert found[f"{notify.PREFIX}webhook 0: late"].enabled


def test_a_mail_arrives(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with PostOffice() as office:
        thread = threading.Thread(target=office.serve_forever)
        thread.start()
        where = f"127.0.0.1:{office.server_address[1]}"
        monkeypatch.setenv("LAB_MAIL", f"mailto://{where}?from=a@example.org&to=b@example.org")
        notify.apply(settings({"kind": "mail", "url_from": "LAB_MAIL", "about": ["promoted"]}))
        tell_promoted("digits", 6, "by hand: looks better")
        until(lambda: office.mails, 0.2)
        office.shutdown()
        thread.join()
    (mail,) = office.mails
    assert "Subject: digits 6 is champion" in mail
    assert "b@example.org" in mail


def test_secrets_reach_no_log_and_no_answer_of_the_server(world: World) -> None:
    """Also if the service fails, and Prefect tells so."""
    mail = {"kind": "mail", "url_from": "LAB_MAIL", "about": ["promoted"]}
    slack = {"kind": "slack", "url_from": "SLACK_WEBHOOK", "about": ["late"]}
    broken = {"kind": "webhook", "url_from": "BROKEN_WEBHOOK", "about": ["promoted"]}
    notify.apply(settings(broken, slack, mail))
    tell_promoted("digits", 5, "better")
    until(lambda: "digits 5 is champion" in world.service.subjects(f"/{TOKEN}-broken"), 0.2)
    with get_client(sync_client=True) as client:
        until(lambda: events(client).count(b'"prefect.automation.action.failed"') == 2, 0.2)
        said = events(client)
        documents = client._client.post("/block_documents/filter", json={}).content
    assert len(world.automations()) == 3
    kept = [path.read_bytes() for path in world.home.rglob("*") if path.is_file()]
    for text in (said, documents, *kept):
        for secret in (TOKEN, TOKEN.replace("-", "")):
            assert secret.encode() not in text


def events(client: Any) -> bytes:
    wanted = {"event": {"prefix": ["prefect.automation.action"]}}
    return bytes(client._client.post("/events/filter", json={"filter": wanted, "limit": 50}).content)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("notify: [{kind: webhook, url_from: NOT_SET_HERE}]", "NOT_SET_HERE is not set"),
        ("notify: [{kind: webhook, url_from: HOME}]", "must begin with http://"),
        ("notify: [{kind: slack, url_from: HALF}]", "no complete URL of a slack"),
        ("notify: [{kind: pigeon, url_from: HOME}]", "notify"),
        ("notify: [{kind: webhook, url_from: HOME, about: [everything]}]", "about"),
        ("inform: []", "inform"),
        ("notify: [", "not YAML"),
    ],
)
def test_wrong_settings_are_one_line(
    tmp_path: Path, text: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HALF", f"https://hooks.slack.com/services/{TOKEN}")
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_settings(path)
    assert word in str(error.value)
    assert str(path) in str(error.value) or "notify" in str(error.value)
    assert TOKEN not in str(error.value) + capsys.readouterr().err


def test_a_query_of_a_web_service_is_kept() -> None:
    assert notify._as_json_service("https://a.example/hook?key=x%26y") == "jsons://a.example/hook?-key=x%26y"


def test_settings_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_settings(tmp_path / "none.yaml")
