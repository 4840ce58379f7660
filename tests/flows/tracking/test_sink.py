"""Everything that a stage tells reaches MLflow in the end, and MLflow never stops a stage."""

import logging
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import MlflowServer, dead_address
from mlflow import MlflowClient
from until import until

from flows.tracking import runs, sink, store
from flows.tracking.sink import UNSENT, MlflowSink, StageTracker, read_unsent
from storage.config import Config
from storage.manifest import Manifest, StageOutput, stage_output
from storage.tracker import publish

PICTURE = b"\x89PNG..."


@pytest.fixture
def client(mlflow_server: MlflowServer) -> Iterator[MlflowClient]:
    yield MlflowClient(mlflow_server.address)
    mlflow_server.start()  # if a test has killed it


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return str(client.create_run("0").info.run_id)


@pytest.fixture
def output(tmp_path: Path) -> StageOutput:
    return stage_output(str(tmp_path / "root"), "plain", 1, Config(), parents={}, inputs={})


def steps(client: MlflowClient, run_id: str, key: str) -> list[int]:
    """The steps of a metric as they lie there, doubles and all."""
    return sorted(metric.step for metric in client.get_metric_history(run_id, key))


def files(client: MlflowClient, run_id: str) -> list[str]:
    return sorted(item.path for item in client.list_artifacts(run_id))


def senders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mlflow"]


def test_metrics_and_files_arrive(
    client: MlflowClient, run_id: str, mlflow_server: MlflowServer, output: StageOutput, tmp_path: Path
) -> None:
    told: list[tuple[int, int, str]] = []
    tracker = StageTracker(MlflowSink(mlflow_server.address, run_id), lambda *what: told.append(what))
    for step in range(2500):  # more than MLflow takes at once
        tracker.metrics({"loss": step / 2}, step=step)
    tracker.artifact("grid.png", PICTURE)
    tracker.progress(3, 4, "steps")
    tracker.close(output)
    history = client.get_metric_history(run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(step, step / 2) for step in range(2500)]
    assert Path(client.download_artifacts(run_id, "grid.png", str(tmp_path))).read_bytes() == PICTURE
    assert told == [(3, 4, "steps, loss 1250")]  # 1249.5, as people read it
    assert not Path(output.uri, UNSENT).exists()
    assert senders() == []


def test_numbers_that_are_none_do_not_hold_up_the_rest(
    client: MlflowClient, run_id: str, mlflow_server: MlflowServer
) -> None:
    sink = MlflowSink(mlflow_server.address, run_id)
    sink.metrics({"nan": math.nan, "more": math.inf, "less": -math.inf, "loss": 1.0}, 0)
    assert sink.close() == []
    found = client.get_run(run_id).data.metrics
    assert math.isnan(found["nan"])
    assert (found["more"] > 1e300, found["less"] < -1e300, found["loss"]) == (True, True, 1.0)


def test_steps_from_before_a_restart_are_not_told_twice(
    client: MlflowClient, run_id: str, mlflow_server: MlflowServer
) -> None:
    for start, skip_to in ((0, -1), (3, 5)):  # killed after step 5, and resumed from a checkpoint at step 3
        sink = MlflowSink(mlflow_server.address, run_id, skip_to)
        for step in (*range(start, start + 4), *range(start + 2, start + 6)):  # back to a checkpoint once
            sink.metrics({"loss": 1.0}, step)
        assert sink.close() == []
    assert steps(client, run_id, "loss") == list(range(9))


def test_a_server_that_is_killed_and_comes_back_has_everything(
    client: MlflowClient, run_id: str, mlflow_server: MlflowServer, caplog: pytest.LogCaptureFixture
) -> None:
    sink = MlflowSink(mlflow_server.address, run_id)
    sink.metrics({"loss": 0.0}, 0)
    until(lambda: steps(client, run_id, "loss") == [0], 0.2)
    mlflow_server.kill()
    for step in range(1, 50):
        sink.metrics({"loss": float(step)}, step)  # returns, or this test never ends
    sink.file("grid.png", PICTURE)
    until(lambda: "records are kept" in caplog.text)
    mlflow_server.start()
    until(lambda: steps(client, run_id, "loss") == list(range(50)), 0.2)
    sink.metrics({"loss": 50.0}, 50)
    assert sink.close() == []
    assert steps(client, run_id, "loss") == list(range(51))
    assert files(client, run_id) == ["grid.png"]
    assert caplog.text.count("records are kept") == 1  # not one line a try


def test_a_server_that_stays_away_is_brought_up_to_date_later(
    client: MlflowClient,
    mlflow_server: MlflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: StageOutput,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.address)
    monkeypatch.setattr(sink, "CLOSE_SECONDS", 2.0)
    root = str(tmp_path / "root")
    with runs.stage_run(output, root) as (tracked, spec):
        assert spec.run_id is not None
        tracker = StageTracker(MlflowSink(spec.uri, spec.run_id, spec.skip_to), None)
        tracker.metrics({"loss": 0.0}, step=0)
        until(lambda: steps(client, spec.run_id, "loss") == [0], 0.2)
        mlflow_server.kill()
        for step in range(1, 4):
            tracker.metrics({"loss": math.nan if step == 2 else 1.0, "psnr": 2.0}, step=step)
        entry = publish(tracked, tracker, "grid.png", PICTURE)
        manifest = tracked.commit(Manifest, [entry], counts={"images": 7})
        tracker.close(tracked)
    metrics, names = read_unsent(output.url(UNSENT))
    assert [(metric.key, metric.step) for metric in metrics] == [(k, s) for s in (1, 2, 3) for k in ("loss", "psnr")]
    assert names == ["grid.png"]
    until(lambda: senders() == [])  # nobody goes on trying behind our back

    runs.sync_run(manifest, root)  # still away: nothing is lost
    assert Path(output.uri, UNSENT).exists()

    mlflow_server.start()
    monkeypatch.setattr(sink, "CLOSE_SECONDS", 500)
    assert client.get_run(spec.run_id).info.status == "RUNNING"
    runs.sync_run(manifest, root)
    assert steps(client, spec.run_id, "loss") == [0, 1, 2, 3]
    assert steps(client, spec.run_id, "psnr") == [1, 2, 3]
    assert files(client, spec.run_id) == ["grid.png", "manifest.json"]
    found = client.get_run(spec.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags[store.MANIFEST_TAG] == manifest.url
    assert found.data.metrics["count.images"] == 7
    assert not Path(output.uri, UNSENT).exists()

    runs.sync_run(manifest, root)  # once more changes nothing
    assert steps(client, spec.run_id, "loss") == [0, 1, 2, 3]
    assert client.get_run(spec.run_id).info.end_time == found.info.end_time


def test_without_a_run_everything_is_kept_and_nobody_waits(output: StageOutput) -> None:
    for attempt in (0, 1):
        tracker = StageTracker(MlflowSink(dead_address(), None), None)
        tracker.metrics({"loss": 0.5}, step=attempt)
        tracker.artifact("grid.png", PICTURE)
        assert senders() == []
        tracker.close(output)
    metrics, names = read_unsent(output.url(UNSENT))
    assert [(metric.key, metric.value, metric.step) for metric in metrics] == [("loss", 0.5, 0), ("loss", 0.5, 1)]
    assert names == ["grid.png", "grid.png"]


def test_records_that_cannot_be_kept_do_not_fail_the_stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "root").write_text("a file where the folder of outputs should be")
    output = stage_output(str(tmp_path / "root"), "plain", 1, Config(), parents={}, inputs={})
    tracker = StageTracker(MlflowSink(dead_address(), None), None)
    tracker.metrics({"loss": 0.5}, step=0)
    with caplog.at_level(logging.ERROR):
        tracker.close(output)
    assert "1 records for MLflow are lost" in caplog.text


def test_ranks_without_a_sink_say_nothing(output: StageOutput) -> None:
    tracker = StageTracker(None, None)
    tracker.metrics({"loss": 0.5}, step=0)
    tracker.artifact("grid.png", PICTURE)
    tracker.progress(1, 2, "steps")
    tracker.close(output)
    assert not Path(output.uri).exists()
