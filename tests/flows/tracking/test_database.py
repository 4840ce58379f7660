"""MLflow's database of a root, whose making is killed, shared and found half done."""

import shutil
import signal
import sqlite3
import urllib.request
from pathlib import Path

import pytest
from faults import start
from mlflow import MlflowClient
from pipelines import ODD
from until import until

from flows import servers
from flows.tracking import database, runs
from flows.tracking.sink import log_file
from storage.errors import InputError

CREATE = "import sys; from pathlib import Path; from flows.tracking import database; database.create(Path(sys.argv[1]))"


def is_being_made(home: Path) -> bool:
    """Whether some of the tables are there."""
    return any(path.stat().st_size > 0 for path in home.glob(".mlflow-being-made-*/mlflow.db"))


def is_whole(home: Path) -> bool:
    database.check(home)
    return bool(MlflowClient(database.address(home)).search_experiments())


@pytest.mark.parametrize("name", ["plain", ODD])
def test_killed_while_it_is_made_it_is_made_again(name: str, tmp_path: Path) -> None:
    home = tmp_path / name
    with start(CREATE, home) as process:
        until(lambda: is_being_made(home))
        process.send_signal(signal.SIGKILL)
    assert not (home / "mlflow.db").exists()
    database.create(home)
    assert is_whole(home)
    assert not list(home.glob(".mlflow-being-made-*/"))
    assert list(tmp_path.iterdir()) == [home]  # and nothing beside it


@pytest.mark.full
def test_two_processes_make_one(tmp_path: Path) -> None:
    with start(CREATE, tmp_path) as one, start(CREATE, tmp_path) as other:
        assert (one.wait(), other.wait()) == (0, 0)
    assert is_whole(tmp_path)


def test_a_half_made_one_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with sqlite3.connect(tmp_path / "mlflow.db") as half:
        half.execute("CREATE TABLE alembic_version (version_num)")
        half.execute("CREATE TABLE _alembic_tmp_experiments (id)")
    half.close()
    with pytest.raises(InputError, match=r"mlflow\.db: MLflow was killed while .*; move the file away and run the"):
        runs.open_client(str(tmp_path))
    (tmp_path / "mlflow.db").write_bytes(b"something else" * 100)
    with pytest.raises(InputError, match=r"mlflow\.db: not a database .*; move the file away"):
        database.check(tmp_path)


def test_one_that_is_there_is_left_alone(tmp_path: Path, tracking_template: Path) -> None:
    database.check(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(tracking_template.read_bytes())
    database.create(tmp_path)
    assert (tmp_path / "mlflow.db").read_bytes() == tracking_template.read_bytes()


WRITE = """
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size = 1")  # so that pages are written before the end of the transaction
database.execute("BEGIN")
database.execute("CREATE TABLE filler (text)")
database.executemany("INSERT INTO filler VALUES (?)", [("x" * 4000,)] * 100)
print("written", flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_writer_that_was_killed_leaves_a_good_one(tmp_path: Path, tracking_template: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(tracking_template.read_bytes())
    with start(WRITE, tmp_path / "mlflow.db") as process:
        assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "mlflow.db-journal").exists()
    database.check(tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as left:
        assert not left.execute("SELECT name FROM sqlite_master WHERE name = 'filler'").fetchall()
    left.close()


def test_one_that_is_busy_is_left_to_mlflow(tmp_path: Path, tracking_template: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(tracking_template.read_bytes())
    with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None) as busy:
        busy.execute("BEGIN EXCLUSIVE")
        database.check(tmp_path)
        busy.execute("ROLLBACK")
    busy.close()


def pictured(root: Path, name: str) -> str:
    """A run of a root with an artifact, which registers a model."""
    client, experiment = runs.open_client(str(root))
    run_id = str(client.create_run(experiment).info.run_id)
    log_file(client, run_id, f"{name}.txt", name.encode())
    return run_id


def seen(root: Path, run_id: str) -> dict[str, str]:
    client, _ = runs.open_client(str(root))
    found = [entry.path for entry in client.list_artifacts(run_id)]
    return {path: Path(client.download_artifacts(run_id, path)).read_text() for path in found}


def test_artifacts_are_found_with_and_without_a_server_and_in_a_moved_root(
    tmp_path: Path, tracking_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / ODD
    root.mkdir()
    shutil.copy(tracking_template, root / "mlflow.db")
    with servers.mlflow_server(root) as server, monkeypatch.context() as served:
        served.setenv("MLFLOW_TRACKING_URI", server.address)
        first = pictured(root, "served")
        address = f"{server.address}/get-artifact?path=served.txt&run_uuid={first}"
        with urllib.request.urlopen(address, timeout=180) as page:  # as MLflow's pages show it
            assert page.read() == b"served"
    second = pictured(root, "alone")
    moved = root.rename(tmp_path / "moved")
    third = pictured(moved, "moved")
    there = {first: "served", second: "alone", third: "moved"}
    assert [seen(moved, run_id) for run_id in there] == [{f"{name}.txt": name} for name in there.values()]
    assert list(tmp_path.iterdir()) == [moved]


def test_artifacts_that_only_a_server_could_find_are_found(
    tmp_path: Path, tracking_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions of `ditflow up` left them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(tracking_template, tmp_path / "mlflow.db")
    client = MlflowClient(database.address(tmp_path))
    experiment = client.create_experiment(runs.EXPERIMENT, artifact_location="mlflow-artifacts:/7")
    other = client.create_experiment("other", artifact_location="mlflow-artifacts-of-others:/7")
    run_id = client.create_run(experiment).info.run_id
    folder = tmp_path / "mlflow-artifacts" / "7" / run_id / "artifacts"
    folder.mkdir(parents=True)
    (folder / "old.txt").write_text("old")
    assert seen(tmp_path, run_id) == {"old.txt": "old"}
    assert client.get_experiment(other).artifact_location == "mlflow-artifacts-of-others:/7"
