"""The metrics of milestones in the MLflow run of their training."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from faults import MlflowServer, dead_address
from mlflow import MlflowClient

from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.metrics.extractors.load import ExtractorRef
from flows.tracking import over_training, runs
from flows.tracking.sink import MlflowSink
from storage.config import Config
from storage.manifest import Manifest, StageOutput, stage_output


class Training(Config):
    """A config for a training that exists only here."""

    root: str


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "root")


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    return MlflowClient(mlflow_server.address)


def training(root: str) -> StageOutput:
    return stage_output(root, "train", 1, Training(root=root), parents={}, inputs={"latents": "a" * 64})


def trained(root: str) -> Manifest:
    with runs.stage_run(training(root), root) as (out, _):
        return out.commit(Manifest, [])


def measured(step: int, fd: float, **conditions: int) -> MetricsManifest:
    config = EvaluateConfig(extractor=ExtractorRef(weights="anywhere"))
    out = stage_output("memory://nothing", "evaluate", 1, config, parents={}, inputs={})
    metrics = {"fd": fd, "fd_low": fd - 1, "fd_high": fd + 1, "recognised": 0.5}
    conditions = {"training_steps": step, "count": 10} | conditions
    manifest = out.manifest(MetricsManifest, metrics=metrics, distance="FD[x]", conditions=conditions)
    return manifest.model_copy(update={"created": datetime(2026, 1, 1, tzinfo=UTC)})


def series(client: MlflowClient, run_id: str | None, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


def test_each_step_is_sent_once(client: MlflowClient, root: str) -> None:
    manifest = trained(root)
    points = {step: measured(step, fd) for step, fd in ((10, 9.0), (20, 7.0), (30, 8.0))}
    over_training.log(manifest, {10: points[10]}, root)
    for _ in range(2):
        over_training.log(manifest, points, root)
    run_id = manifest.provenance.mlflow_run_id
    assert series(client, run_id, "milestone_fd") == [(10, 9.0), (20, 7.0), (30, 8.0)]
    assert series(client, run_id, "milestone_fd_low") == [(10, 8.0), (20, 6.0), (30, 7.0)]
    run = client.get_run(run_id)
    assert run.data.tags["ditflow.best_milestone"] == "step 20: FD[x] 7"
    assert run.info.status == "FINISHED"


def test_another_way_of_evaluation_has_names_of_its_own(client: MlflowClient, root: str) -> None:
    manifest = trained(root)
    over_training.log(manifest, {10: measured(10, 9.0)}, root)
    for _ in range(2):
        over_training.log(manifest, {10: measured(10, 2.0, count=50), 20: measured(20, 1.0, count=50)}, root)
    run = client.get_run(manifest.provenance.mlflow_run_id)
    assert series(client, run.info.run_id, "milestone_fd") == [(10, 9.0)]
    (name,) = [name for name in run.data.metrics if name.endswith("_fd") and name != "milestone_fd"]
    assert name.startswith("milestone_")
    assert series(client, run.info.run_id, name) == [(10, 2.0), (20, 1.0)]
    assert run.data.tags["ditflow.best_milestone"] == "step 10: FD[x] 9"


def test_what_mlflow_misses_is_sent_later(
    client: MlflowClient, root: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = trained(root)
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", dead_address())
        away.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        over_training.log(manifest, {10: measured(10, 9.0)}, root)
    assert "MLflow does not answer" in caplog.text
    over_training.log(manifest, {10: measured(10, 9.0)}, root)
    assert series(client, manifest.provenance.mlflow_run_id, "milestone_fd") == [(10, 9.0)]


def test_a_training_without_a_run_is_left_alone(client: MlflowClient, root: str) -> None:
    over_training.log(training(root).header, {10: measured(10, 9.0)}, root)
    manifest = trained(root)
    client.delete_run(manifest.provenance.mlflow_run_id)
    over_training.log(manifest, {10: measured(10, 9.0)}, root)
    assert client.get_run(manifest.provenance.mlflow_run_id).data.metrics == {}


def test_training_that_begins_again_skips_no_step_because_of_them(client: MlflowClient, root: str) -> None:
    """The steps 6 to 9 were lost with a killed process; meanwhile another worker has evaluated step 9."""
    with pytest.raises(KeyError), runs.stage_run(training(root), root) as (_, spec):
        sink = MlflowSink(spec.uri, spec.run_id, spec.skip_to)
        sink.metrics({"loss": 1.0}, 5)
        assert sink.close() == []
        over_training.log(training(root).header, {9: measured(9, 9.0)}, root)
        raise KeyError
    assert series(client, spec.run_id, "milestone_fd") == [(9, 9.0)]
    with runs.stage_run(training(root), root) as (_, again):
        assert (again.run_id, again.skip_to) == (spec.run_id, 5)
        training(root).commit(Manifest, [])
