"""A command killed just as a manifest appears: the same command again leaves nothing open, nor behind."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from pipelines import EVERYTHING, arguments, ditflow

from flows.tracking import runs

KILLED = """
import os, signal, sys
from flows.command.main import main
from storage.manifest import StageOutput

commit = StageOutput.commit

def commit_and_die(output, kind, *files, **fields):
    manifest = commit(output, kind, *files, **fields)
    if kind.STAGE == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return manifest

StageOutput.commit = commit_and_die
main(sys.argv[2:])
"""


def flow_runs(root: Path) -> list[str]:
    with sqlite3.connect(f"file:{root}/prefect/prefect.db?mode=ro", uri=True) as database:
        return [state for (state,) in database.execute("SELECT state_type FROM flow_run")]


@pytest.mark.full
def test_the_same_command_again_leaves_nothing_open(
    tmp_path: Path, digits: Path, migrated: Callable[[Path], None]
) -> None:
    root, temporary = tmp_path / "root", tmp_path / "temporary"
    migrated(root)
    temporary.mkdir()
    env = os.environ | {"TMPDIR": str(temporary)}
    given = arguments("run", root, digits)
    for stage in ("evaluate", "register"):
        killed = subprocess.run([sys.executable, "-c", KILLED, stage, *given], env=env, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert "RUNNING" in flow_runs(root)
        assert list(temporary.iterdir())
    again = subprocess.run(ditflow(*given), env=env, stdout=subprocess.PIPE, check=True)
    report = json.loads(again.stdout)
    assert {stage["state"] for stage in report["stages"]} == {"skipped"}
    client = MlflowClient(runs.tracking_uri(str(root)))
    statuses = {name: client.get_run(run_id).info.status for name, run_id in report["mlflow_run_ids"].items()}
    assert statuses == dict.fromkeys([*EVERYTHING, "pipeline"], "FINISHED")
    assert set(flow_runs(root)) == {"COMPLETED", "CRASHED"}
    assert list((root / "running").iterdir()) == []
    assert list(temporary.iterdir()) == []
