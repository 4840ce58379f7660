"""A model registered on a real MLflow server, and served from there."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from faults import MlflowServer
from flips import unnoticed
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from PIL import Image
from small import SAMPLING, Small

from dit.encode import EncodeConfig, held_out_config
from dit.evaluate import MetricsManifest
from dit.export import CheckpointManifest
from dit.sample import SampleManifest
from dit.training.config import HeldOutLoss
from flows import servers
from flows.children import child
from flows.registry import exported, register
from flows.registry.card import _autoencoder as autoencoder
from flows.registry.config import ModelManifest, PromotionRule, RegisterConfig
from flows.registry.promotion import EVALUATION_TAG, PROMOTION_TAG, Evaluation, promote
from flows.registry.register import _registered as registered
from flows.tracking import runs
from flows.tracking.models import finish
from flows.tracking.store import DIGEST_TAG, MANIFEST_TAG
from storage.errors import DitflowError, InputError
from storage.latents import VaeInfo
from storage.manifest import Manifest, StageOutput, stage_output
from storage.rows.store import RowReader
from storage.shards.shard import ShardManifest
from storage.tracker import NullTracker

NAME = "it's <b>50 %20< é #1"


@pytest.fixture(scope="module")
def models(
    mlflow_server: MlflowServer, prefect_api: str, tmp_path_factory: pytest.TempPathFactory
) -> list[ModelManifest]:
    """Two versions of a model, the second trained for one step more, which is too little to be champion."""
    small = Small(tmp_path_factory.mktemp("root"))
    latents = small.latents()
    config = RegisterConfig(model_name=NAME, promote="automatic", rule=PromotionRule(min_gain=1e9))
    return [small.registered(small.evaluated(small.checkpoint(latents, steps)), config) for steps in (2, 3)]


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    return MlflowClient(mlflow_server.address)


def test_a_version_tells_its_numbers_and_where_they_come_from(
    models: list[ModelManifest], client: MlflowClient
) -> None:
    tags = client.get_model_version(NAME, "2").tags
    metrics = models[1].parent("metrics", MetricsManifest)
    assert {key: float(tags[f"metric.{key}"]) for key in metrics.metrics} == pytest.approx(metrics.metrics, rel=1e-5)
    whole = Evaluation.model_validate_json(tags[EVALUATION_TAG])
    assert (whole.metrics, whole.conditions) == (metrics.metrics, metrics.conditions)
    root = Path(metrics.uri).parents[1]
    for stage, name in {"encode": "latents", "shard": "shards", "train": "checkpoint", "sample": "samples"}.items():
        assert tags[f"digest.{name}"] in {Manifest.read(str(path)).digest for path in (root / stage).iterdir()}
    shards = Manifest.read(str(next((root / "shard").iterdir())))
    assert {split: tags[f"digest.archive.{split}"] for split in ("train", "held_out")} == shards.inputs


def test_the_description_of_a_version_is_its_card(models: list[ModelManifest], client: MlflowClient) -> None:
    metrics = models[1].parent("metrics", MetricsManifest)
    version = client.get_model_version(NAME, "2")
    text, run_id = version.description, version.run_id
    assert text.startswith("Draws images of 16 x 16 pixels, of 10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9). `dit` (")
    assert f"| fd | {metrics.estimate} |" in text
    for part in (
        "**Images:** 80 images",
        "**Training:** 3 steps",
        "seed 0",
        f"![Samples](get-artifact?path=samples.png&run_uuid={run_id})",
    ):
        assert part in text
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert script is not None
    made: dict[str, Any] = {}
    exec(script[1], made)
    assert len(made["images"]) == 1 and made["png"].startswith(b"\x89PNG")


@pytest.mark.parametrize(("source", "shown"), [("/home/me/vae", "vae"), ("stabilityai/vae", "stabilityai/vae")])
def test_a_card_has_no_path_of_the_machine(source: str, shown: str) -> None:
    vae = VaeInfo(source=source, sha256="ab" * 32, downsample=8, channels=4, scaling_factor=1.0)
    assert autoencoder(vae) == f"`{shown}` (weights `{'ab' * 8}`)"


def test_a_version_leads_to_the_manifest_of_its_training(models: list[ModelManifest], tmp_path: Path) -> None:
    root = models[0].root
    trained = [one.parent("metrics", MetricsManifest).parent("samples", SampleManifest) for one in models]
    urls = [samples.parent("checkpoint", CheckpointManifest).url for samples in trained]
    assert [runs.resolve(f"models:/{NAME}/{number}", root) for number in (1, 2)] == urls
    assert runs.resolve(f"models:/{NAME}@champion", root) == urls[0]
    for reference, line in {
        f"models:/{NAME}": "write models:/name@alias or models:/name/version",
        f"models:/{NAME}@chmpion": "has no alias chmpion; it has candidate, champion",
        f"models:/{NAME}/9": "Model Version .* not found",
        "models:/other@champion": "Registered Model with name=other not found; name one that exists, or make it first",
    }.items():
        with pytest.raises(InputError, match=line):
            runs.resolve(reference, root)


def test_a_version_of_a_root_that_was_copied_or_moved_leads_there(
    models: list[ModelManifest], tmp_path: Path, client: MlflowClient
) -> None:
    moved = Path(shutil.copytree(Path(models[0].root) / "train", tmp_path / "train"))
    tag = client.get_model_version(NAME, "1").tags[MANIFEST_TAG]
    there = str(moved / Path(tag).parent.name / "manifest.json")
    assert runs.resolve(f"models:/{NAME}/1", str(tmp_path)) == there  # though the one that was copied is there, too
    client.set_model_version_tag(NAME, "1", MANIFEST_TAG, str(tmp_path / "gone" / "manifest.json"))
    try:
        assert runs.resolve(f"models:/{NAME}/1", str(tmp_path)) == there
        with pytest.raises(InputError, match=r"models:/.*/1: its training is no longer at .*gone/manifest\.json"):
            runs.resolve(f"models:/{NAME}/1", str(tmp_path / "other"))
    finally:
        client.set_model_version_tag(NAME, "1", MANIFEST_TAG, tag)


def test_the_run_shows_the_samples_and_the_model_has_the_metrics(
    models: list[ModelManifest], client: MlflowClient
) -> None:
    version = client.get_model_version(NAME, "2")
    assert "samples.png" in {entry.path for entry in client.list_artifacts(version.run_id)}
    assert [entry.path for entry in models[1].files] == ["artifacts/samples.png"]
    assert models[1].read_object("artifacts/samples.png").startswith(b"\x89PNG")
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    assert {metric.key: metric.value for metric in logged.metrics} == pytest.approx(models[1].metrics)


def test_metrics_are_compared_by_model_and_dataset(models: list[ModelManifest], client: MlflowClient) -> None:
    metrics = [version.parent("metrics", MetricsManifest) for version in models]
    trained = [each.parent("samples", SampleManifest).parent("checkpoint", CheckpointManifest) for each in metrics]
    latents = trained[0].latents()
    measured = ("shards", latents.parent("shards", ShardManifest).digest[:32])
    experiment = client.get_experiment_by_name(runs.EXPERIMENT)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    for model, evaluated in zip(trained, metrics, strict=True):
        selector = f"tags.`{DIGEST_TAG}` = '{model.digest}'"
        (found,) = client.search_logged_models([experiment.experiment_id], selector)
        assert (found.status, found.model_type, found.params["steps"]) == ("READY", "dit", str(model.counts["steps"]))
        values = {(metric.key, metric.dataset_name, metric.dataset_digest): metric.value for metric in found.metrics}
        assert values["fd", *measured] == evaluated.metrics["fd"]
        assert values["final_loss", "latents", latents.digest[:32]] == model.metrics["final_loss"]
        run = client.get_run(evaluated.provenance.mlflow_run_id)
        assert [each.model_id for each in run.inputs.model_inputs] == [found.model_id]
        assert client.get_run(found.source_run_id).data.tags[DIGEST_TAG] == model.digest
        client.finalize_logged_model(found.model_id, LoggedModelStatus.PENDING)
        for made in (model, evaluated):  # again, as after a kill
            finish(client, str(made.provenance.mlflow_run_id), made)
        (again,) = client.search_logged_models([experiment.experiment_id], selector)
        assert (again.model_id, again.status) == (found.model_id, "READY")
        assert len(again.metrics) == len(found.metrics)
        assert len(client.get_metric_history(run.info.run_id, "fd")) == 1
    by_distance = client.search_logged_models(
        [experiment.experiment_id],
        "metrics.fd > 0",
        datasets=[dict(zip(("dataset_name", "dataset_digest"), measured, strict=True))],
        order_by=[{"field_name": "metrics.fd"}],
    )
    assert {model.name.split()[0] for model in by_distance} >= {"train", "model"}


def test_a_model_without_metrics_is_registered_with_its_loss_on_held_out_images(
    mlflow_server: MlflowServer, prefect_api: str, tmp_path: Path, client: MlflowClient
) -> None:
    small = Small(tmp_path / "root")
    latents = small.latents()
    shards = latents.parent("shards", ShardManifest)
    small.bring("encode", held_out_config(EncodeConfig.model_validate(latents.config)), shards)
    checkpoint = small.checkpoint(latents, held_out=HeldOutLoss(every=1, images=20))
    samples = small.bring("sample", SAMPLING, checkpoint)
    config = RegisterConfig(model_name="unmeasured", promote="automatic")
    version = small.bring("register", config, samples)
    assert isinstance(version, ModelManifest)
    assert set(version.parents) == {"samples"}
    said = json.loads(Path(checkpoint.uri, "artifacts", "held_out_loss.json").read_text())["points"][-1]
    assert version.metrics == {name: said[name] for name in ("held_out_loss", "held_out_loss_se")}
    tags = client.get_model_version("unmeasured", "1").tags
    assert float(tags["metric.held_out_loss"]) == pytest.approx(version.metrics["held_out_loss"], rel=1e-5)
    assert EVALUATION_TAG not in tags
    assert version.promotion == (
        "unmeasured 1 is not promoted: it has no metrics; `ditflow promote` makes it champion by hand"
    )
    assert exported.export_faults(version.uri) == []
    said = promote("unmeasured", None, "it looks good", version.root)
    assert said.endswith("is champion; before, it was none; not compared, since one of them has no metrics")
    model = mlflow.pyfunc.load_model("models:/unmeasured@champion")
    assert len(model.predict(pd.DataFrame({"label": [3]}))) == 1


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "sample.json", "manifest.json"])
def test_a_registered_model_that_was_changed_does_not_load(
    models: list[ModelManifest], tmp_path: Path, name: str
) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}@candidate", dst_path=str(tmp_path)))
    mlflow.pyfunc.load_model(str(folder))
    (path,) = folder.rglob(name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DitflowError, match=rf"{name}: does not hold the bytes that were committed"):
        mlflow.pyfunc.load_model(str(folder))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "sample.json", "manifest.json"])
def test_a_changed_file_of_a_version_is_named(
    models: list[ModelManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert exported.export_faults(models[1].uri) == []
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}/2", dst_path=str(tmp_path)))
    monkeypatch.setattr(exported, "download_artifacts", lambda *_, **__: str(folder))
    assert exported.export_faults(models[1].uri) == []
    (path,) = folder.rglob(name)
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    (fault,) = exported.export_faults(models[1].uri)
    assert fault.startswith(f"{NAME} 2: ") and f"{name}: does not hold the bytes that were committed" in fault


def test_a_version_that_is_gone_cannot_be_checked(
    models: list[ModelManifest], tmp_path: Path, tracking_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = shutil.copy(tracking_template, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    (fault,) = exported.export_faults(models[1].uri)
    assert fault.startswith(f"{NAME} 2: cannot be checked: ")


def test_metrics_that_were_made_again_otherwise_make_another_version(
    models: list[ModelManifest], client: MlflowClient
) -> None:
    out = StageOutput(uri=models[1].uri, header=models[1])
    other = models[1].parents["metrics"].model_copy(update={"content": "0" * 64})
    header = models[1].model_copy(update={"parents": {"metrics": other}})
    assert registered(client, NAME, out) == 2
    assert registered(client, NAME, out.model_copy(update={"header": header})) is None


def test_no_flip_in_what_was_registered_goes_unnoticed(models: list[ModelManifest]) -> None:
    assert unnoticed(models[1], each=20) == []


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("", r"sqlite:.*/mlflow\.db, which holds the registry, cannot be used; the log says why\. Mend it and run"),
        ("http://127.0.0.1:9", r"http://127\.0\.0\.1:9, which holds the registry, does not answer; start it and run"),
    ],
)
def test_a_registry_without_a_run_is_called_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, line: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    out = stage_output(str(tmp_path), "register", 1, RegisterConfig(model_name="x"), parents={}, inputs={})
    with pytest.raises(DitflowError, match=f"^register: {line} register again$"):
        register.run(RegisterConfig(model_name="x"), MetricsManifest.model_construct(), out=out, tracker=NullTracker())


def test_the_rule_decides_who_is_champion(models: list[ModelManifest], client: MlflowClient) -> None:
    assert client.get_registered_model(NAME).aliases == {"candidate": "2", "champion": "1"}
    assert str(models[0].promotion).startswith(f"{NAME} 1 is champion: rule: distance lower by at least 1e+09")
    assert str(models[1].promotion).startswith(f"{NAME} 2 is not promoted: rule: distance lower by at least 1e+09")
    tags = client.get_model_version(NAME, "2").tags
    (record,) = (json.loads(value) for name, value in tags.items() if name.startswith(PROMOTION_TAG))
    assert (record["decision"], record["old_champion"]) == ("kept", 1)


def test_a_version_is_served_with_its_guide(models: list[ModelManifest], client: MlflowClient, tmp_path: Path) -> None:
    small = Small(Path(models[0].root))
    bad, good = (
        one.parent("metrics", MetricsManifest)
        .parent("samples", SampleManifest)
        .parent("checkpoint", CheckpointManifest)
        for one in models
    )
    metrics = small.evaluated(good, SAMPLING.model_copy(update={"guide": bad.uri}))
    version = small.registered(metrics, RegisterConfig(model_name="guided"))
    assert client.get_model_version("guided", "1").tags["digest.guide"] == bad.digest
    assert exported.export_faults(version.uri) == []
    folder = Path(mlflow.artifacts.download_artifacts("models:/guided/1", dst_path=str(tmp_path)))
    drawn = RowReader(metrics.parent("samples", SampleManifest))
    asked = pd.DataFrame({"label": drawn.array("label").astype("int64")})
    found = mlflow.pyfunc.load_model(str(folder)).predict(asked)["png_base64"]
    pngs = np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in found])
    assert np.array_equal(pngs, drawn.array("image"))
    (weights,) = (folder / "artifacts" / "guide").glob("*.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(DitflowError, match=r"model\.safetensors: does not hold the bytes that were committed"):
        mlflow.pyfunc.load_model(str(folder))


def test_each_root_has_its_own_registry(
    models: list[ModelManifest], tmp_path: Path, tracking_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    metrics = models[0].parent("metrics", MetricsManifest)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        database = Path(shutil.copy(tracking_template, tmp_path / name / "mlflow.db"))
        Small(tmp_path / name).registered(metrics, RegisterConfig(model_name=name))
        assert [model.name for model in MlflowClient(f"sqlite:///{database}").search_registered_models()] == [name]


@pytest.fixture(scope="module")
def endpoint(models: list[ModelManifest], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow models serve` of the candidate, in a process of its own."""
    port, log = servers.free_port(), tmp_path_factory.mktemp("serve") / "serve.log"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{NAME}@candidate"]
    command += ["--env-manager", "local", "--host", servers.HOST, "--port", str(port)]
    address = f"http://{servers.HOST}:{port}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # mlflow looks for uvicorn there
    with log.open("wb") as output, child(command, env={"PATH": path}, output=output) as process:
        deadline = time.monotonic() + 180
        while not _answers(address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address


def _answers(address: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{address}/ping", timeout=5).status == 200)
    except OSError:
        return False


def ask(address: str, labels: list[Any], *, column: str = "label", **params: Any) -> list[bytes]:
    body = {"dataframe_split": {"columns": [column], "data": [[label] for label in labels]}, "params": params}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/invocations", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=180) as answer:
        return [base64.b64decode(row["png_base64"]) for row in json.load(answer)["predictions"]]


def test_a_request_is_answered_with_png_images(endpoint: str) -> None:
    pngs = ask(endpoint, [3, 7], seed=5, steps=2, guidance_scale=1.5, sampler="ddpm")
    assert [Image.open(io.BytesIO(png)).size for png in pngs] == [(16, 16), (16, 16)]
    assert pngs[0] != pngs[1]
    assert ask(endpoint, [3, 7], seed=5, steps=2, guidance_scale=1.5, sampler="ddpm") == pngs
    for change in ({"seed": 6}, {"steps": 3}, {"guidance_scale": 3.0}, {"sampler": "ddim"}):
        asked: dict[str, Any] = {"seed": 5, "steps": 2, "guidance_scale": 1.5, "sampler": "ddpm"} | change
        assert ask(endpoint, [3, 7], **asked) != pngs, change


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_of_the_card_draws_an_image(endpoint: str, client: MlflowClient) -> None:
    script = re.search(r"^curl .*$", client.get_model_version(NAME, "2").description, re.MULTILINE)
    assert script is not None
    command = script[0].replace("127.0.0.1:8080", endpoint)
    answer = subprocess.run(command, shell=True, capture_output=True, check=True).stdout
    (row,) = json.loads(answer)["predictions"]
    assert Image.open(io.BytesIO(base64.b64decode(row["png_base64"]))).size == (16, 16)


def test_a_class_may_be_asked_for_by_name(endpoint: str) -> None:
    assert ask(endpoint, ["3", "7"], column="class", steps=2) == ask(endpoint, [3, 7], steps=2)


def test_without_params_images_are_drawn_as_they_were_evaluated(endpoint: str) -> None:
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@candidate")
    params = {param.name: param.default for param in model.metadata.signature.params}
    assert {name: params[name] for name in ("seed", "steps", "guidance_scale", "sampler")} == {
        "seed": SAMPLING.seed,
        "steps": SAMPLING.steps,
        "guidance_scale": SAMPLING.guidance_scale,
        "sampler": SAMPLING.sampler,
    }
    assert ask(endpoint, [1]) == ask(endpoint, [1], **params)


@pytest.mark.parametrize(
    ("labels", "params", "said"),
    [
        (["x"], {"column": "class"}, "the model has no class 'x'"),
        ([1], {"column": "klass"}, "pass either the column label or the column class"),
        ([10], {}, "label: must lie between 0 and 9"),
        ([1], {"sampler": "heun"}, "sampler"),
        ([1], {"steps": "x"}, "steps"),
        ([1], {"guidance_scal": 2.0}, "guidance_scal: no such param; there are guidance_channels, guidance_scale,"),
    ],
)
def test_a_wrong_request_is_refused(endpoint: str, labels: list[Any], params: dict[str, Any], said: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(endpoint, labels, **params)
    assert caught.value.code == 400
    assert said in json.load(caught.value)["message"]
