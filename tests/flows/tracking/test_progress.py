"""Progress is shown wherever somebody may look, and never stops the work."""

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import all_gone, descendants
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)
from prefect_rest import PASSWORD
from until import until

from flows import servers
from flows.tracking import progress
from flows.tracking.progress import StageProgress


def test_off_a_terminal_there_are_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    with StageProgress("train").shown() as shown:
        shown.update(1, 4000, "steps")
        assert capsys.readouterr().err == ""  # not one for each update
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
        shown.update(2000, 4000, "steps")
        shown.update(4000, 4000, "steps")
    said = capsys.readouterr()
    assert said.err.splitlines() == ["train: 2,000 of 4,000 steps, 0:00:00 left", "train: 4,000 of 4,000 steps"]
    assert said.out == ""


def test_the_time_left_is_at_the_pace_of_this_attempt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 60.0, 120.0, 180.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown = StageProgress("train")
    for done in (3000, 3010, 3030, 4000):
        shown.update(done, 4000, "steps")
    assert capsys.readouterr().err.splitlines() == [
        "train: 3,010 of 4,000 steps, 1:39:00 left",
        "train: 3,030 of 4,000 steps, 1:04:40 left",
        "train: 4,000 of 4,000 steps",
    ]


def test_nothing_to_do_is_no_error() -> None:
    with StageProgress("encode").shown() as shown:
        shown.update(0, 0, "images")


def test_on_a_terminal_there_is_a_bar() -> None:
    script = """
from flows.tracking.progress import StageProgress
with StageProgress("encode").shown() as shown:
    for done in range(5):
        shown.update(done, 4, "images")
"""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", script], stderr=theirs, stdout=subprocess.PIPE, env=env, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "encode" in shown
    assert "4/4" in shown
    assert done.stdout == b""


def test_a_flow_has_an_artifact_that_ends_full(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "ARTIFACT_SECONDS", 0.0)

    @flow
    def working() -> None:
        with StageProgress("artifact-test").shown() as shown:
            for done in range(1, 4):
                shown.update(done, 4, "images")
                shown._sender.join()
            shown.update(4, 4, "images")

    working()
    (artifact,) = artifacts("artifact-test-progress")
    assert artifact.type == "progress"
    assert artifact.data == 100.0
    assert artifact.description == "images done"


def artifacts(key: str) -> list[Any]:
    with get_client(sync_client=True) as client:
        return list(client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key]))))


def test_a_killed_prefect_server_does_not_stop_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "ARTIFACT_SECONDS", 0.0)
    before, worked = set(descendants()), []

    @flow
    def working() -> None:
        with StageProgress("killed-test").shown() as shown:
            shown.update(1, 9, "images")
            shown._sender.join()
            assert shown._artifact is not None
            pids = [pid for pid in descendants() if pid not in before]
            for pid in pids:
                os.kill(pid, 9)
            until(lambda: all_gone(pids))
            for done in (2, 3):
                shown.update(done, 9, "images")
                shown._sender.join()
        worked.append(True)

    with servers.prefect_server(tmp_path, password=PASSWORD) as server:
        settings = {
            PREFECT_API_URL: f"{server.address}/api",
            PREFECT_API_AUTH_STRING: PASSWORD,
            PREFECT_CLIENT_MAX_RETRIES: 0,
            PREFECT_LOGGING_TO_API_ENABLED: False,
        }
        with temporary_settings(settings), pytest.raises(Exception):  # noqa: B017  what Prefect raises at the flow's end
            working()
    assert worked == [True]
    assert caplog.text.count("Prefect cannot show the progress") == 1
