"""Progress is shown wherever somebody may look, and never stops the work."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from faults import all_gone, descendants
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, LogFilter, LogFilterFlowRunId
from prefect.runtime import flow_run
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
    assert said.err.splitlines() == ["train: 2,000 of 4,000 steps", "train: 4,000 of 4,000 steps"]
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
        "train: 3,010 of 4,000 steps, 10/min, 1:39:00 left",
        "train: 3,030 of 4,000 steps, 15/min, 1:04:40 left",
        "train: 4,000 of 4,000 steps, 5.56/s",
    ]


def test_off_a_terminal_a_stage_leaves_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.stages_shown(["shard", "encode"]):
        progress.began("shard")
        with StageProgress("shard").shown() as shown:
            shown.note("starting 2 ranks under torchrun")
        progress.ended("shard", 75.0, skipped=False)
        progress.ended("encode", 0.1, skipped=True)
    assert capsys.readouterr().err.splitlines() == [
        "shard: starting 2 ranks under torchrun",
        "shard: done in 0:01:15",
        "encode: was done before",
    ]


def test_nothing_to_do_is_no_error() -> None:
    with StageProgress("encode").shown() as shown:
        shown.update(0, 0, "images")


def test_on_a_terminal_there_is_a_table() -> None:
    script = """
from flows.tracking.progress import StageProgress, began, ended, stages_shown
with stages_shown(["shard", "encode", "train", "sample"]):
    began("shard")
    ended("shard", 0.1, skipped=True)
    began("encode")
    with StageProgress("encode").shown() as shown:
        for done in range(5):
            shown.update(done, 4, "images")
    ended("encode", 71, skipped=False)
    began("train")
    with StageProgress("train").shown() as shown:
        shown.note("starting 2 ranks under torchrun")
        shown.update(20, 100, "steps, loss 0.25")
    ended("train", 3, skipped=False)
with StageProgress("alone").shown() as shown:
    shown.update(1, 2, "images")
"""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "140"}
    done = subprocess.run([sys.executable, "-c", script], stderr=theirs, stdout=subprocess.PIPE, env=env, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    last = " ".join(re.sub(r"\x1b\[[0-9;?]*\w|━", "", shown).rpartition("sample")[2].split())
    assert last == (
        "shard was done before encode 4 images done in 0:01:11 train 100 steps, loss 0.25 done in 3.0 s "
        "alone alone 2 images done"
    )
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


def test_prefects_log_tells_the_pace_now_and_then(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)

    @flow
    def training() -> str:
        shown = StageProgress("train")
        shown.update(20, 100, "steps, loss 0.5")
        shown.update(80, 100, "steps, loss 0.25")
        return str(flow_run.id)

    of_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(training())]))
    with get_client(sync_client=True) as client:
        until(lambda: any(LINE.fullmatch(log.message) for log in client.read_logs(of_run)))


LINE = re.compile(r"80 of 100 steps, loss 0\.25, [\d.,e+]+/(s|min), \d:\d\d:\d\d left")


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
