"""The whole pipeline, small but real: as a user runs it, and killed in every stage."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from faults import MlflowServer
from mlflow import MlflowClient
from PIL import Image
from pipelines import EVERYTHING, KEPT, ODD, STAGES, arguments, ditflow
from until import until

from dit.sample import SampleManifest
from flows.command.main import main
from flows.contract import ENCODE_HELD_OUT
from storage.manifest import BEGUN
from storage.rows.store import RowReader

OPENED = Path(__file__).with_name("opened")
REPOSITORY = Path(__file__).parents[2]


def reported(name: str, root: Path, digits: Path, *more: str) -> dict[str, Any]:
    """What the command says, run in this process."""
    with redirect_stdout(io.StringIO()) as said:
        assert main(arguments(name, root, digits, *more)) == 0
    report = json.loads(said.getvalue())
    assert isinstance(report, dict)
    return report


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root") / ODD


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that holds what the first run opened and listed."""
    return tmp_path_factory.mktemp("opened") / "events"


@pytest.fixture(scope="module")
def report(
    root: Path, digits: Path, opened: Path, migrated: Callable[[Path], None], mlflow_server: MlflowServer
) -> dict[str, Any]:
    """Of the whole pipeline, run by the command as a process, with a Prefect server of its own."""
    migrated(root)
    env = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    env |= {"OPENED": str(opened), "PYTHONPATH": f"{OPENED}{os.pathsep}{REPOSITORY}"}
    command = ditflow(*arguments("run", root, digits))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def states(report: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in report["stages"]}


def manifests(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {stage["name"]: json.loads(Path(stage["manifest"]).read_text()) for stage in report["stages"]}


def test_every_stage_runs_and_the_report_says_so(report: dict[str, Any]) -> None:
    assert states(report) == dict.fromkeys(EVERYTHING, "ran")
    assert all(stage["seconds"] > 0 for stage in report["stages"])
    assert 0 <= report["metrics"]["recognised"] <= 1
    assert report["metrics"]["fd_floor"] < report["metrics"]["fd_ceiling"]
    assert set(report["mlflow_run_ids"]) == {*EVERYTHING, "pipeline"}


def test_lineage_leads_from_the_metrics_to_the_images(report: dict[str, Any]) -> None:
    made = manifests(report)
    chain = [("register", "metrics", "evaluate"), ("evaluate", "samples", "sample"), ("sample", "checkpoint", "train")]
    chain += [("train", "latents", "encode"), ("encode", "shards", "shard")]
    for child, role, parent in chain:
        assert made[child]["parents"][role]["digest"] == made[parent]["digest"]
    assert set(made["shard"]["inputs"]) == {"train", "held_out"}
    assert made["shard"]["counts"]["images"] == 10 * sum(KEPT.values())


def test_an_archive_is_listed_once_and_weights_are_read_once_for_each_use(
    report: dict[str, Any], digits: Path, opened: Path
) -> None:
    events = Counter(line.partition(" ")[::2] for line in opened.read_text().splitlines())
    for split in KEPT:
        assert events["os.scandir", f"{digits}/{split}"] == 2  # of what type it is, and which classes it has
        assert {events["os.scandir", f"{digits}/{split}/{label}"] for label in range(10)} == {1}
    read = Counter(Path(path).resolve() for (event, path), n in events.items() for _ in range(n) if event == "open")
    demo = REPOSITORY / "flows" / "demo"
    first = 2  # its first bytes, and its hash
    checked = 3  # by the preflight, as encode, for either split, and sample would use it
    used = 4  # by encode, for either split, by sample and register
    assert read[demo / "vae" / "diffusion_pytorch_model.safetensors"] == first + checked + used
    assert read[demo / "classifier" / "model.safetensors"] == first + 1 + 2  # the preflight; evaluate, report


def test_the_documented_stage_is_all_that_a_new_stage_needs(
    report: dict[str, Any], root: Path, digits: Path, tmp_path: Path, prefect_api: str
) -> None:
    for package in ("flows", "dit", "storage"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "prefect.yaml", tmp_path)
    page = (REPOSITORY / "docs" / "contributing" / "stage.md").read_text()
    (diff,) = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "flows.write_schema"], cwd=tmp_path, env=env, check=True)
    (tmp_path / "rates.yaml").write_text("{shard: 1, encode: 1, train: 1, sample: 1, decode: 1, evaluate: 1}")

    def said(name: str, *more: str) -> dict[str, Any]:
        command = ditflow(*arguments(name, root, digits, "--set", "mean={count: 8}", *more))
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    mean = said("mean")
    assert states(mean) == {"mean": "ran"}
    made = manifests(mean)["mean"]
    assert made["parents"]["samples"]["digest"] == manifests(report)["sample"]["digest"]
    assert [file["path"] for file in made["files"]] == ["artifacts/mean.png"]
    assert mean["mlflow_run_ids"]["mean"] == made["provenance"]["mlflow_run_id"]
    lines = said("plan", "--rates", "rates.yaml")["lines"]
    assert {line["stage"]: line["state"] for line in lines} == dict.fromkeys([*STAGES[:-1], "mean"], "done")
    deployed = yaml.safe_load((tmp_path / "prefect.yaml").read_text())["deployments"]
    assert "flows.stages.mean" in [deployment["entrypoint"] for deployment in deployed]


def test_held_out_images_are_encoded_and_measured(report: dict[str, Any], root: Path) -> None:
    """By a stage of their own, with a run in MLflow below that of the pipeline."""
    client, ids, train = MlflowClient(), report["mlflow_run_ids"], manifests(report)["train"]
    for kind in ("held_out_loss", "held_out_loss_raw_level_4", "held_out_loss_se"):
        assert [metric.step for metric in client.get_metric_history(ids["train"], kind)] == [10, 20, 30]
    assert "held_out_loss.json" in {entry.path for entry in client.list_artifacts(ids["train"])}
    held_out = manifests(report)[ENCODE_HELD_OUT]
    assert held_out["split"] == "held_out"
    assert (held_out["counts"]["images"], held_out["flips"]) == (10 * KEPT["held_out"], 1)
    run = client.get_run(held_out["provenance"]["mlflow_run_id"])
    assert (run.data.tags["mlflow.parentRunId"], run.info.status) == (ids["pipeline"], "FINISHED")
    assert run.info.run_name == f"{train['provenance']['pipeline_id']} {ENCODE_HELD_OUT}"
    said = json.loads(Path(root, "train", train["digest"][:16], "artifacts", "held_out_loss.json").read_text())
    assert said["conditions"]["latents"] == held_out["digest"]
    assert held_out["digest"] not in [parent["digest"] for parent in train["parents"].values()]
    (page,) = (root / "reports").glob("*/report.html")
    assert re.search(rf"{ENCODE_HELD_OUT}</td>\s*<td>{held_out['digest'][:16]}", page.read_text())


def test_a_second_run_skips_every_stage(report: dict[str, Any], root: Path, digits: Path) -> None:
    (page,) = (root / "reports").glob("*/report.html")
    page.unlink()  # as if the first had been killed before it
    again = reported("run", root, digits)
    assert states(again) == dict.fromkeys(EVERYTHING, "skipped")
    assert [stage["manifest"] for stage in again["stages"]] == [stage["manifest"] for stage in report["stages"]]
    assert page.exists()
    assert again["metrics"] == report["metrics"]
    assert again["mlflow_run_ids"] == report["mlflow_run_ids"]


def test_the_report_is_found_and_written_again(
    report: dict[str, Any], root: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (page,) = (root / "reports").glob("*/report.html")
    written = page.read_bytes()
    page.unlink()
    assert main([part for part in arguments("report", root, digits) if part != "--json"]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_bytes() == written


def test_a_changed_field_reruns_what_depends_on_it(
    report: dict[str, Any], root: Path, digits: Path, prefect_api: str
) -> None:
    other = reported("run", root, digits, "--set", "sample.guidance_scale=3.0")
    before = ("shard", "encode", ENCODE_HELD_OUT, "train")
    assert states(other) == {name: "skipped" if name in before else "ran" for name in EVERYTHING}


def test_one_stage_on_an_earlier_output(report: dict[str, Any], root: Path, digits: Path, prefect_api: str) -> None:
    run_id = report["mlflow_run_ids"]["train"]
    other = ["--from", run_id, "--set", "sample.seed=1", "--set", "sample.count=10"]
    alone = reported("sample", root, digits, *other)
    assert states(alone) == {"sample": "ran"}
    assert manifests(alone)["sample"]["parents"]["checkpoint"]["digest"] == manifests(report)["train"]["digest"]
    forced = reported("sample", root, digits, *other, "--force")
    assert states(forced) == {"sample": "ran"}
    first, second = manifests(alone)["sample"], manifests(forced)["sample"]
    assert first["digest"] != second["digest"]
    assert first["files"] == second["files"]  # the same work makes the same bytes, beside the old ones


def test_mlflow_holds_params_metrics_pictures_and_lineage(report: dict[str, Any]) -> None:
    client = MlflowClient()
    ids = report["mlflow_run_ids"]
    runs = {name: client.get_run(run_id) for name, run_id in ids.items()}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    pipeline = runs["pipeline"]
    for name in STAGES:
        tags = runs[name].data.tags
        assert tags["mlflow.parentRunId"] == ids["pipeline"]
        assert tags["prefect.flow_run_id"]
        assert "prefect.flow_run_url" not in tags  # the command's own server has ended with it
        assert tags["mlflow.runName"] == f"{pipeline.info.run_name} {name}"
        assert tags["mlflow.note.content"].startswith(f"**{name}**: ")
        assert runs[name].inputs.dataset_inputs
        artifacts = {entry.path for entry in client.list_artifacts(ids[name])}
        assert "manifest.json" in artifacts
    assert runs["train"].data.params["steps"] == "30"
    assert re.fullmatch(r"demo-[0-9a-f]{8}", pipeline.info.run_name)
    assert pipeline.data.params["train.steps"] == "30"
    numbers = pipeline.data.metrics
    costs = {name: numbers.pop(name) for name in list(numbers) if name.startswith("cost.")}
    assert numbers == pytest.approx(report["metrics"])
    each = [runs[name].data.metrics["cost.device_seconds"] for name in STAGES]
    assert costs["cost.device_seconds"] > sum(each) > 0 < min(each)  # with the encoding of held-out images
    assert "| fd | " in pipeline.data.tags["mlflow.note.content"]
    assert [metric.step for metric in client.get_metric_history(ids["train"], "loss")] == [5, 10, 15, 20, 25, 30]
    pictures = {"shard": "images", "encode": "reconstructions", "train": "loss", "sample": "samples"}
    for name, picture in pictures.items():
        assert f"{picture}.png" in {entry.path for entry in client.list_artifacts(ids[name])}
    assert "report.html" in {entry.path for entry in client.list_artifacts(ids["pipeline"])}


def test_the_registered_model_draws_digits(report: dict[str, Any]) -> None:
    version = MlflowClient().get_model_version_by_alias("ditflow-demo", "candidate")
    assert version.tags["digest.latents"] == manifests(report)["encode"]["digest"]
    model = mlflow.pyfunc.load_model("models:/ditflow-demo@candidate")
    labels = pd.DataFrame({"label": [3, 7]})
    first = model.predict(labels, params={"seed": 5, "steps": 3})
    image = Image.open(io.BytesIO(base64.b64decode(first["png_base64"][1])))
    assert image.size == (32, 32)
    assert first.equals(model.predict(labels, params={"seed": 5, "steps": 3}))
    assert not first.equals(model.predict(labels, params={"seed": 6, "steps": 3}))


@pytest.mark.full
def test_normalised_channels_reach_the_samples_and_the_served_model(
    report: dict[str, Any], root: Path, digits: Path, prefect_api: str
) -> None:
    other = reported("run", root, digits, "--set", "train.normalise=channel")
    before = ("shard", "encode", ENCODE_HELD_OUT)
    assert states(other) == {name: "skipped" if name in before else "ran" for name in EVERYTHING}
    made = manifests(other)
    assert len(made["train"]["card"]["channels"]["mean"]) == made["encode"]["latent_shape"][0]
    samples = RowReader(SampleManifest.read(str(Path(root, "sample", made["sample"]["digest"][:16]))))
    labels, drawn = samples.array("label")[:10], samples.array("image")[:10]
    served = mlflow.pyfunc.load_model("models:/ditflow-demo@candidate").predict(pd.DataFrame({"label": labels}))
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in served["png_base64"]]
    assert np.abs(np.stack(images).astype(int) - drawn).max() <= 1


def begun(root: Path, stage: str, before: set[Path]) -> bool:
    """Whether a stage has written something behind `BEGUN`, and more than it had before."""
    return any(BEGUN not in path.name for path in set((root / stage).glob("*/**/*")) - before)


def leftovers(root: Path) -> list[str]:
    return [
        " ".join(process.info["cmdline"])
        for process in psutil.process_iter(["cmdline"])
        if str(root) in " ".join(process.info["cmdline"] or [])
    ]


@pytest.mark.full
def test_sigkill_in_every_stage_ends_in_the_same_bits(
    report: dict[str, Any], digits: Path, tmp_path: Path, migrated: Callable[[Path], None]
) -> None:
    migrated(tmp_path)
    for stage in STAGES:
        before = set((tmp_path / stage).rglob("*"))
        with subprocess.Popen(
            ditflow(*arguments("run", tmp_path, digits)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as run:
            until(partial(begun, tmp_path, stage, before))
            os.kill(run.pid, signal.SIGKILL)
        until(lambda: leftovers(tmp_path) == [], 0.2)
    healed, undisturbed = manifests(reported("run", tmp_path, digits)), manifests(report)
    for stage in STAGES[:-1]:
        assert healed[stage]["digest"] == undisturbed[stage]["digest"]
        kept = {entry["path"]: entry["sha256"] for entry in healed[stage]["files"]}
        assert kept == {entry["path"]: entry["sha256"] for entry in undisturbed[stage]["files"]}
    assert healed["evaluate"]["metrics"] == undisturbed["evaluate"]["metrics"]


SWEEP = """
name: pixels
base: demo-diffit
change:
  train.steps: 4
  train.batch_size: 8
  train.model.size: {stem_width: 32, widths: [32], depths: [1], window: 4, time_width: 32}
  shard.images_per_shard: 50
  sample.count: 20
  sample.steps: 2
vary:
  sample.seed: [0, 1]
"""


PREDICT = """
import json, mlflow, pandas
model = mlflow.pyfunc.load_model("models:/ditflow-demo-diffit/1")
print(json.dumps(list(model.predict(pandas.DataFrame({"label": [3, 7]}))["png_base64"])))
"""


@pytest.mark.full
def test_a_sweep_of_models_on_pixels_shares_its_stages_and_is_served(
    tmp_path: Path, digits: Path, prefect_api: str, mlflow_server: MlflowServer
) -> None:
    (tmp_path / "pixels.yaml").write_text(SWEEP)
    sets = [part for split in ("train", "held_out") for part in ("--set", f"archive.{split}={digits / split}")]
    recipe, root = tmp_path / "pixels.yaml", tmp_path / "root"
    with redirect_stdout(io.StringIO()) as said:
        assert main(["run", str(recipe), "--root", str(root), "--json", *sets]) == 0
    first, second = map(json.loads, said.getvalue().splitlines())
    assert (first["recipe"], second["recipe"]) == ("pixels-0", "pixels-1")
    assert states(first) == dict.fromkeys(STAGES, "ran")
    assert states(second) == {name: "skipped" if name in ("shard", "encode", "train") else "ran" for name in STAGES}
    assert first["metrics"] != second["metrics"]
    drawn = subprocess.run([sys.executable, "-c", PREDICT], capture_output=True, text=True, check=True)
    sides = [Image.open(io.BytesIO(base64.b64decode(image))).size for image in json.loads(drawn.stdout)]
    assert sides == [(16, 16), (16, 16)]
