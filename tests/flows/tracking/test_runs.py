"""One run in MLflow for each output, with its lineage, whatever became of the attempts at it."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from faults import MlflowServer, dead_address, start
from mlflow import MlflowClient
from mlflow.entities import Run

from flows.tracking import runs, store
from flows.tracking.sink import UNSENT, MlflowSink, StageTracker, read_unsent
from flows.tracking.spec import TrackingSpec
from storage.config import Config, operational
from storage.cost import metered
from storage.errors import DitflowError, InputError
from storage.header import Provenance
from storage.manifest import Manifest, StageOutput, stage_output
from storage.processors import Processors

LOST = "https://me:pa55@host/vae?token=h1dden"


class Inner(Config):
    depth: int = 2
    source: str = LOST


class Plain(Config):
    """A config for stages that exist only here."""

    value: int = 1
    sizes: tuple[int, ...] = (8, 16)
    inner: Inner = Inner()
    everywhere: str = operational(LOST)


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    return MlflowClient(mlflow_server.address)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "root")


def named(root: str, stage: str = "plain", parent: Manifest | None = None, **provenance: Any) -> StageOutput:
    """An output of its own for each test: the root is part of its config."""
    parents = {"before": parent} if parent else {}
    inputs = {} if parent else {"archive": "a" * 64}
    config = Plain(value=abs(hash(root)) % 10**9)
    return stage_output(root, stage, 1, config, parents=parents, inputs=inputs, provenance=Provenance(**provenance))


def finished(output: StageOutput, root: str, tell: Callable[[StageTracker], None] | None = None) -> Manifest:
    """Perform a stage as `flows.perform` does."""
    with runs.stage_run(output, root) as (tracked, spec):
        tracker = StageTracker(MlflowSink(spec.uri, spec.run_id, spec.skip_to), None)
        if tell:
            tell(tracker)
        manifest = tracked.commit(Manifest, [], counts={"images": 7}, metrics={"psnr": 30.5})
        tracker.close(tracked)
    return manifest


def losses(*steps: int) -> Callable[[StageTracker], None]:
    def tell(tracker: StageTracker) -> None:
        for step in steps:
            tracker.metrics({"loss": float(step)}, step=step)

    return tell


def steps(client: MlflowClient, run_id: str | None) -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, "loss"))


def of_digest(client: MlflowClient, digest: str) -> list[Run]:
    experiment = client.get_experiment_by_name(runs.EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id], f"tags.`{store.DIGEST_TAG}` = '{digest}'"))


@pytest.mark.parametrize(
    "address",
    [
        "https://me:secret@lab.example.org",
        "http://secret@lab.example.org:5000/mlflow",
        "postgresql+psycopg://me:a/secret@lab.example.org:5432/mlflow",
        "postgresql://lab.example.org/mlflow?user=me&Password=secret",
    ],
)
def test_no_address_with_a_login_reaches_a_run(address: str, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with (
        pytest.raises(InputError, match="^MLFLOW_TRACKING_URI contains a login.* MLFLOW_TRACKING_PASSWORD") as refused,
        runs.stage_run(named(root), root),
    ):
        pass
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:5000",
        "https://lab.example.org/mlflow@home",
        "postgresql://lab.example.org:5432/mlflow?sslmode=require&sslkey=/me/key.pem",
        "sqlite:////data/me@home/c:d@e/mlflow.db",
        "databricks",
    ],
)
def test_an_address_without_a_login_is_taken(address: str, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert runs.tracking_uri(root) == address


def test_a_run_says_all_of_its_stage(client: MlflowClient, root: str) -> None:
    address = "http://127.0.0.1:4200/runs/flow-run/x"
    output = named(root, pipeline_id="p-1", prefect_flow_run_id="x", prefect_flow_run_url=address)
    with runs.pipeline_run("p-1", root) as pipeline:
        manifest = finished(output, root)
    run = client.get_run(manifest.provenance.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["value"] == str(output.header.config["value"])
    assert (run.data.params["sizes"], run.data.params["inner.depth"]) == ("[8, 16]", "2")
    assert (run.data.metrics["psnr"], run.data.metrics["count.images"]) == (30.5, 7)
    tags = run.data.tags
    assert (tags["mlflow.runName"], tags[store.STAGE_TAG], tags[store.DIGEST_TAG]) == (
        "plain",
        "plain",
        manifest.digest,
    )
    assert (tags["mlflow.parentRunId"], tags[store.PIPELINE_TAG]) == (pipeline, "p-1")
    assert (tags["prefect.flow_run_id"], tags["prefect.flow_run_url"]) == ("x", address)
    note = tags["mlflow.note.content"]
    assert note.startswith(f"**plain**: plain.\n\nFrom archive `{'a' * 16}`.\n\nMade 7 images, in `")
    assert "| psnr | 30.5 |" in note
    assert note.endswith(f"[Prefect flow run]({address})")
    assert tags["ditflow.code_version"] == manifest.code_version
    logged = client.download_artifacts(run.info.run_id, "manifest.json")
    assert Manifest.model_validate_json(Path(logged).read_bytes()).digest == manifest.digest
    assert client.get_run(pipeline).info.status == "FINISHED"
    assert runs.pipeline_run_id("p-1", root) == pipeline
    assert runs.resolve(run.info.run_id, root) == manifest.url
    assert str(runs.run_url(run.info.run_id, root)).endswith(f"/runs/{run.info.run_id}?workflowType=machine_learning")


def test_a_run_says_what_its_stage_cost(client: MlflowClient, root: str) -> None:
    output = named(root)
    with metered(output.uri, Processors()):
        manifest = finished(output, root)
    run, cost = client.get_run(manifest.provenance.mlflow_run_id), manifest.cost
    assert cost is not None
    assert run.data.metrics["cost.device_seconds"] == cost.device_seconds
    assert run.data.metrics["cost.peak_memory_gib"] == cost.peak_memory / 2**30
    assert ("cost.energy_kwh" in run.data.metrics) == (cost.energy_joules is not None)
    note = run.data.tags["mlflow.note.content"]
    assert f"Cost {cost.device_seconds:,.1f} s of devices (processors), peak memory " in note
    assert ("energy not known: " in note) == (cost.energy_joules is None)


def test_datasets_join_a_stage_to_the_one_before(client: MlflowClient, root: str) -> None:
    first = finished(named(root, "first"), root)
    second = finished(named(root, "second", first), root)

    def datasets(manifest: Manifest) -> dict[str, tuple[str, str, str, str]]:
        inputs = client.get_run(manifest.provenance.mlflow_run_id).inputs.dataset_inputs
        tags = [{tag.key: tag.value for tag in item.tags} for item in inputs]
        return {
            tag["mlflow.data.context"]: (
                d.dataset.name,
                d.dataset.digest,
                tag["digest"],
                json.loads(d.dataset.source)["uri"],
            )
            for tag, d in zip(tags, inputs, strict=True)
        }

    made = ("first", first.digest[:32], first.digest, first.uri)
    assert datasets(first) == {"input": ("archive", "a" * 32, "a" * 64, "archive"), "output": made}
    assert datasets(second)["input"] == ("before", *made[1:])


def test_secrets_in_addresses_stay_out(client: MlflowClient, root: str) -> None:
    run = client.get_run(finished(named(root), root).provenance.mlflow_run_id)
    assert run.data.params["inner.source"] == run.data.params["everywhere"] == "https://host/vae"
    everything = json.dumps(run.to_dictionary())
    assert "pa55" not in everything
    assert "h1dden" not in everything


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")],
)
def test_a_run_that_did_not_end_well_says_so_and_goes_on(
    client: MlflowClient, root: str, error: BaseException, status: str
) -> None:
    output, name = named(root), f"p-{root}"
    with (
        pytest.raises(type(error)),
        runs.pipeline_run(name, root) as pipeline,
        runs.stage_run(output, root) as (tracked, _),
    ):
        raise error
    run_id = tracked.header.provenance.mlflow_run_id
    assert client.get_run(run_id).info.status == client.get_run(pipeline).info.status == status
    assert finished(output, root).provenance.mlflow_run_id == run_id
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(of_digest(client, output.header.digest)) == 1


def test_a_run_that_a_killed_process_left_open_is_taken_up_again(client: MlflowClient, root: str) -> None:
    output = named(root)
    script = """
import os, signal, sys
from flows.tracking import runs, store
from flows.tracking.sink import MlflowSink
from storage.manifest import StageOutput
with runs.stage_run(StageOutput.model_validate_json(sys.argv[1]), sys.argv[2]) as (tracked, spec):
    sink = MlflowSink(spec.uri, spec.run_id, spec.skip_to)
    for step in range(6):
        sink.metrics({"loss": step}, step)
    assert sink.close() == []
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert start(script, output.model_dump_json(), root).wait() == -signal.SIGKILL
    (left,) = of_digest(client, output.header.digest)
    assert left.info.status == "RUNNING"
    resumed = finished(output, root, losses(4, 5, 6, 7))  # from a checkpoint at step 3
    assert resumed.provenance.mlflow_run_id == left.info.run_id
    assert steps(client, left.info.run_id) == list(range(8))
    assert client.get_run(left.info.run_id).info.status == "FINISHED"


def test_a_finished_run_is_not_opened_again(client: MlflowClient, root: str) -> None:
    first = finished(named(root), root)
    with runs.stage_run(named(root), root) as (tracked, _):  # its folder was deleted, say
        pass
    assert tracked.header.provenance.mlflow_run_id != first.provenance.mlflow_run_id


def test_without_mlflow_the_work_goes_on_and_is_sent_later(
    client: MlflowClient, root: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = named(root, pipeline_id=f"p-{root}")
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", dead_address())
        with runs.pipeline_run(f"p-{root}", root) as pipeline:
            assert pipeline is None
            with runs.stage_run(output, root) as (tracked, spec):
                assert spec.run_id is None
                tracker = StageTracker(MlflowSink(spec.uri, spec.run_id, spec.skip_to), None)
                losses(1, 2)(tracker)
                manifest = tracked.commit(Manifest, [], counts={"images": 7})
                tracker.close(tracked)
        runs.sync_run(manifest, root)
        assert runs.pipeline_run_id(f"p-{root}", root) is None
        assert runs.run_url("0" * 32, root) is None
        with pytest.raises(DitflowError, match=r"^http://127.0.0.1:\d+: MLflow does not answer"):
            runs.resolve("0" * 32, root)
    assert Manifest.read(output.uri).provenance.mlflow_run_id is None
    assert "the stage goes on without it" in caplog.text

    for _ in range(2):
        runs.sync_run(manifest, root)
        (run,) = of_digest(client, manifest.digest)
        assert run.info.status == "FINISHED"
        assert steps(client, run.info.run_id) == [1, 2]
        assert run.data.tags["mlflow.parentRunId"] == runs.pipeline_run_id(f"p-{root}", root)
        assert not Path(output.uri, UNSENT).exists()
    assert runs.resolve(run.info.run_id, root) == manifest.url


def test_what_a_failed_attempt_kept_is_sent_by_the_next_one(
    client: MlflowClient, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow goes away at step 3, the attempt fails at step 6, and resumes from a checkpoint at step 4."""
    output = named(root)
    with pytest.raises(ValueError), runs.stage_run(output, root) as (_, spec):
        sink = MlflowSink(spec.uri, spec.run_id, spec.skip_to)
        for step in (1, 2, 3):
            sink.metrics({"loss": float(step)}, step)
        assert sink.close() == []
        deaf = StageTracker(MlflowSink(spec.uri, None), None)
        losses(3, 4, 5, 6)(deaf)  # step 3 arrived, but we never heard that it did
        deaf.close(output)
        raise ValueError
    manifest = finished(output, root, losses(5, 6, 7, 8))
    assert manifest.provenance.mlflow_run_id == spec.run_id
    assert steps(client, spec.run_id) == list(range(1, 9))
    assert not Path(output.uri, UNSENT).exists()


def test_two_attempts_without_mlflow_keep_each_step_once(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_address())
    output = named(root)
    with pytest.raises(ValueError), runs.stage_run(output, root) as (_, spec):
        tracker = StageTracker(MlflowSink(spec.uri, spec.run_id, spec.skip_to), None)
        losses(1, 2, 3)(tracker)
        tracker.close(output)
        raise ValueError
    finished(output, root, losses(2, 3, 4))
    assert [metric.step for metric in read_unsent(output.url(UNSENT))[0]] == [1, 2, 3, 4]


def test_a_stage_whose_end_was_cut_short_is_finished_by_sync_run(client: MlflowClient, root: str) -> None:
    output = named(root)
    with pytest.raises(KeyboardInterrupt), runs.stage_run(output, root) as (tracked, _):
        manifest = tracked.commit(Manifest, [])
        raise KeyboardInterrupt
    run_id = manifest.provenance.mlflow_run_id
    assert client.get_run(run_id).info.status == "KILLED"
    runs.sync_run(manifest, root)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert runs.resolve(str(run_id), root) == manifest.url


LEFT_OPEN = """
import os, signal, sys
from flows.tracking import runs, store
from flows.tracking.sink import MlflowSink, StageTracker
from storage.manifest import Manifest, StageOutput
from storage.tracker import publish
output, root = StageOutput.model_validate_json(sys.argv[1]), sys.argv[2]
with runs.pipeline_run(output.header.provenance.pipeline_id, root), runs.stage_run(output, root) as (tracked, spec):
    picture = publish(tracked, StageTracker(None, None), "grid.png", b"pixels")
    tracked.commit(Manifest, [picture], counts={"images": 7}, metrics={"psnr": 30.5})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_skip_finishes_what_a_kill_just_behind_the_manifest_left_open(client: MlflowClient, root: str) -> None:
    output = named(root, pipeline_id=f"p-{root}")
    assert start(LEFT_OPEN, output.model_dump_json(), root).wait() == -signal.SIGKILL
    manifest = Manifest.read(output.uri)
    pipeline = runs.pipeline_run_id(f"p-{root}", root)
    ids = (manifest.provenance.mlflow_run_id, pipeline)
    assert [client.get_run(run_id).info.status for run_id in ids] == ["RUNNING", "RUNNING"]
    for _ in range(2):
        runs.sync_pipeline(f"p-{root}", [manifest], root)
        assert [client.get_run(run_id).info.status for run_id in ids] == ["FINISHED", "FINISHED"]
    assert {entry.path for entry in client.list_artifacts(ids[0])} == {"grid.png", "manifest.json"}
    for key, value in {"psnr": 30.5, "count.images": 7.0}.items():
        assert [metric.value for metric in client.get_metric_history(ids[0], key)] == [value]
    assert len(of_digest(client, output.header.digest)) == 1


def test_runs_are_the_same_whatever_the_clock_says(
    client: MlflowClient, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is set back by a year between two attempts, and once more behind the stage."""
    output, name, real, year = named(root), f"p-{root}", time.time, 365 * 24 * 3600
    with (
        pytest.raises(ValueError),
        runs.pipeline_run(name, root) as pipeline,
        runs.stage_run(output, root) as (_, spec),
    ):
        sink = MlflowSink(spec.uri, spec.run_id, spec.skip_to)
        sink.metrics({"loss": 1.0}, 1)
        assert sink.close() == []
        raise ValueError
    monkeypatch.setattr(time, "time", lambda: real() - year)
    with runs.pipeline_run(name, root) as again:
        manifest = finished(output, root, losses(1, 2))
    assert (again, manifest.provenance.mlflow_run_id) == (pipeline, spec.run_id)
    assert steps(client, spec.run_id) == [1, 2]
    infos = [client.get_run(run_id).info for run_id in (pipeline, spec.run_id)]
    assert all(info.end_time >= info.start_time for info in infos)
    monkeypatch.setattr(time, "time", lambda: real() - 2 * year)
    for _ in range(2):  # what a new attempt without MLflow would send later goes to a run that there is
        runs.sync_run(manifest.model_copy(update={"provenance": Provenance()}), root)
    assert [run.info.run_id for run in of_digest(client, output.header.digest)] == [spec.run_id]


def test_a_deleted_experiment_is_named_with_the_remedy(
    client: MlflowClient, root: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runs, "EXPERIMENT", "deleted")
    manifest = finished(named(root), root)
    client.delete_experiment(runs.open_client(root)[1])
    said = r"^http.*: the experiment 'deleted' was deleted; restore it with `(.*)`$"
    for opening in (runs.stage_run(named(root, "other"), root), runs.pipeline_run("p", root)):
        with pytest.raises(InputError, match=said) as refused, opening:
            pass
    runs.sync_pipeline("p", [manifest], root)  # a skip needs no tracking
    assert "MLflow refuses; the stage goes on without it" in caplog.text
    command = re.match(said, str(refused.value))
    assert command is not None
    subprocess.run(f"PATH={Path(sys.executable).parent}:$PATH {command[1]}", shell=True, check=True)
    assert finished(named(root, "other"), root).provenance.mlflow_run_id


def test_a_deleted_run_stays_deleted(client: MlflowClient, root: str, caplog: pytest.LogCaptureFixture) -> None:
    output = named(root)

    def delete(tracker: StageTracker) -> None:
        client.delete_run(of_digest(client, output.header.digest)[0].info.run_id)
        losses(1, 2)(tracker)

    manifest = finished(output, root, delete)
    assert "MLflow refuses; records are kept" in caplog.text
    caplog.clear()
    runs.sync_pipeline("p", [manifest], root)
    assert caplog.text == ""
    assert of_digest(client, manifest.digest) == []
    client.restore_run(manifest.provenance.mlflow_run_id)
    runs.sync_pipeline("p", [manifest], root)
    assert steps(client, manifest.provenance.mlflow_run_id) == [1, 2]
    assert client.get_run(manifest.provenance.mlflow_run_id).info.status == "FINISHED"


def test_a_run_of_another_store_is_left_there(
    client: MlflowClient, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = finished(named(root), root)
    runs.sync_pipeline("p", [manifest.model_copy(update={"provenance": Provenance(mlflow_run_id="0" * 32)})], root)
    assert caplog.text == ""


def test_a_renamed_experiment_keeps_its_runs(client: MlflowClient, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "EXPERIMENT", "renamed")
    output = named(root)
    with pytest.raises(KeyboardInterrupt), runs.stage_run(output, root) as (tracked, _):
        manifest = tracked.commit(Manifest, [])
        raise KeyboardInterrupt
    client.rename_experiment(runs.open_client(root)[1], f"renamed {root}")
    runs.sync_pipeline("p", [manifest], root)
    assert client.get_run(manifest.provenance.mlflow_run_id).info.status == "FINISHED"
    assert runs.resolve(str(manifest.provenance.mlflow_run_id), root) == manifest.url


def test_nothing_is_printed(client: MlflowClient, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is the command's own, for its JSON."""
    finished(named(root), root)
    assert capsys.readouterr().out == ""


def test_an_unknown_run_has_no_manifest(client: MlflowClient, root: str) -> None:
    with pytest.raises(InputError, match=f"Run with id={'0' * 32} not found"):
        runs.resolve("0" * 32, root)
    assert runs.pipeline_run_id("never", root) is None


def test_processes_that_start_at_once_share_the_experiment(
    client: MlflowClient, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Barrier(6)

    def open_together(_: int) -> str:
        together.wait()
        return runs.open_client(root)[1]

    with ThreadPoolExecutor(6) as pool:
        for attempt in range(5):
            monkeypatch.setattr(runs, "EXPERIMENT", f"contended-{attempt}")
            found = set(pool.map(open_together, range(6)))
            assert found == {client.get_experiment_by_name(runs.EXPERIMENT).experiment_id}


def test_without_a_server_runs_are_kept_in_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking_template: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert runs.tracking_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    assert runs.run_url("0" * 32, str(tmp_path)) is None
    shutil.copy(tracking_template, tmp_path / "mlflow.db")
    manifest = finished(named(str(tmp_path)), str(tmp_path))
    assert runs.resolve(str(manifest.provenance.mlflow_run_id), str(tmp_path)) == manifest.url


def test_a_remote_root_leaves_no_folder_here(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs.open_client("memory://root")
    assert list(tmp_path.iterdir()) == []


def test_another_attempt_skips_what_the_run_has_or_what_waits_to_be_sent(client: MlflowClient, root: str) -> None:
    def attempt(tracked: StageOutput, spec: TrackingSpec, *steps: int) -> TrackingSpec:
        tracker = StageTracker(MlflowSink(spec.uri, spec.run_id, spec.skip_to), None)
        losses(*steps)(tracker)
        tracker.close(tracked)
        return runs.skip_recorded(spec, tracked)

    with pytest.raises(KeyError), runs.stage_run(named(root), root) as (tracked, spec):
        assert runs.skip_recorded(spec, tracked).skip_to == -1
        again = attempt(tracked, spec, 10, 20, 30)
        assert again.skip_to == 30
        assert attempt(tracked, again, 20, 30, 40).skip_to == 40
        assert steps(client, spec.run_id) == [10, 20, 30, 40]
        away = TrackingSpec(uri=dead_address(), run_id=None)
        assert attempt(tracked, away, 50, 60).skip_to == 60
        raise KeyError
