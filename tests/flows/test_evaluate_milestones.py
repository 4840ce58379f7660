"""Milestones evaluated: by the pipeline, and by another worker while training goes on."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults import MlflowServer
from mlflow import MlflowClient
from pipelines import EVERYTHING, SMALL, arguments
from small import Small
from test_killed import KILLED
from test_pipeline import reported, states

from dit.evaluate import MetricsManifest
from dit.sample import SampleManifest
from flows import milestones as watching
from flows import processes
from flows.contract import ENCODE_HELD_OUT, STAGES
from flows.milestones import milestones
from flows.over_training import model_of
from flows.perform import RunSettings
from flows.recipe import Recipe, load_recipe
from flows.servers import local_home
from flows.tracking import runs, store
from flows.tracking.over_training import ENDED_EARLY
from storage.errors import DitflowError
from storage.manifest import Manifest
from storage.rows.store import RowReader

COUNT = 20
ASKED = {
    "train.steps": 30,
    "train.milestones": 10,
    "evaluate_milestones.sample.count": COUNT,
    "registry.checkpoint": "best",
}
SETS = [part for key, value in ASKED.items() for part in ("--set", f"{key}={value}")]
STEPS = [10, 20, 30]


def recipe_of(root: Path, digits: Path, **more: Any) -> Recipe:
    values = SMALL | {f"archive.{split}": f"{digits}/{split}" for split in ("train", "held_out")} | ASKED | more
    return load_recipe("demo", [f"{key}={value}" for key, value in values.items()], str(root))


@dataclass(frozen=True)
class Made:
    """A finished root."""

    root: Path
    report: dict[str, Any]
    """What the command said."""

    @property
    def points(self) -> dict[int, MetricsManifest]:
        return {
            each["step"]: MetricsManifest.read(each["manifest"])
            for each in self.report["milestones"]
            if each["name"] == "evaluate"
        }

    def history(self, name: str) -> list[tuple[int, float]]:
        """Of a metric in the run of the training."""
        run_id = self.report["mlflow_run_ids"]["train"]
        found = MlflowClient().get_metric_history(run_id, name)
        return sorted((metric.step, metric.value) for metric in found)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, digits: Path, prefect_api: str, mlflow_server: MlflowServer
) -> Iterator[Made]:
    root = tmp_path_factory.mktemp("root")
    yield Made(root, reported("run", root, digits, *SETS))


def test_each_is_a_stage_like_any_other(made: Made) -> None:
    assert states(made.report) == dict.fromkeys(EVERYTHING, "ran")
    expected = [(step, name, "ran") for step in STEPS for name in ("sample", "evaluate")]
    assert [(each["step"], each["name"], each["state"]) for each in made.report["milestones"]] == expected
    for step, metrics in made.points.items():
        assert model_of(metrics).card.steps == step
        assert metrics.counts["samples"] == COUNT
    conditions = [{**each.conditions, "training_steps": 0} for each in made.points.values()]
    assert conditions[0] == conditions[1] == conditions[2]


def test_the_training_run_has_them_at_their_steps(made: Made) -> None:
    for name in ("fd", "fd_low", "fd_high", "recognised"):
        assert made.history(f"milestone_{name}") == [(step, each.metrics[name]) for step, each in made.points.items()]
    winner = min(made.points, key=lambda step: made.points[step].metrics["fd"])
    tags = MlflowClient().get_run(made.report["mlflow_run_ids"]["train"]).data.tags
    assert tags["ditflow.best_milestone"].startswith(f"step {winner}: FD[demo-digits@")


def test_the_best_is_registered_and_named(made: Made, digits: Path) -> None:
    winner = min(made.points, key=lambda step: made.points[step].metrics["fd"])
    model = model_of(made.points[winner])
    version = MlflowClient().get_model_version_by_alias("ditflow-demo", "candidate")
    assert version.tags["digest.checkpoint"] == model.digest
    samples = Manifest.read(next(each["manifest"] for each in made.report["stages"] if each["name"] == "sample"))
    assert samples.inputs["checkpoint"] == model.digest
    assert samples.counts["images"] == SMALL["sample.count"]
    (page,) = (made.root / "reports").glob("*/report.html")
    text = page.read_text()
    assert f"Best: step {winner}, {made.points[winner].distance} {made.points[winner].estimate}." in text
    assert f"Each point is from {COUNT} samples. Registered and shown in the other sections: step {winner}." in text
    recipe = recipe_of(made.root, digits)
    assert recipe.source_of("sample", None, str(made.root)) == model.url
    last = recipe_of(made.root, digits, **{"registry.checkpoint": "last"})
    assert Manifest.read(str(last.source_of("sample", None, str(made.root)))).counts["steps"] == 30


def test_chosen_classes_are_drawn_of_the_best(made: Made, digits: Path) -> None:
    """They change nothing of how the milestones are evaluated, which say another number of images."""
    drawn = reported("sample", made.root, digits, *SETS, "--class", "3", "--class", "7", "--count", "6")
    samples = SampleManifest.read(drawn["stages"][0]["manifest"])
    assert sorted(RowReader(samples).array("label").tolist()) == [3, 3, 3, 7, 7, 7]
    winner = min(made.points, key=lambda step: made.points[step].metrics["fd"])
    assert samples.inputs["checkpoint"] == model_of(made.points[winner]).digest


def test_a_second_run_skips_them_and_sends_nothing_twice(made: Made, digits: Path) -> None:
    before = made.history("milestone_fd")
    again = reported("run", made.root, digits, *SETS)
    assert states(again) == dict.fromkeys(EVERYTHING, "skipped")
    assert [(each["step"], each["state"]) for each in again["milestones"]] == [(step, "skipped") for step in STEPS]
    assert made.history("milestone_fd") == before
    assert again["metrics"] == made.report["metrics"]
    client, run_id = MlflowClient(), made.report["mlflow_run_ids"]["train"]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_another_worker_follows_training(
    tmp_path: Path, digits: Path, prefect_api: str, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it waits, training goes on: to the latents, to two milestones, to the end."""
    recipe, small = recipe_of(tmp_path, digits, **{"train.held_out": "null"}), Small(tmp_path)
    asked = recipe.over_training
    assert asked is not None
    looks: list[tuple[int, int]] = []

    def done(stage: str) -> int:
        return len(list(tmp_path.glob(f"{stage}/*/manifest.json")))

    def to_latents() -> None:
        small.bring("encode", recipe.encode, small.bring("shard", recipe.shard, recipe.archive))

    def to(*steps: int) -> None:
        latents = recipe.finished(str(tmp_path), before="train")
        assert latents is not None
        for step in steps:
            small.bring("train", asked.configs(str(tmp_path))[step], latents[-1])

    world = iter([to_latents, lambda: to(10, 20), lambda: to(30)])

    def wait(_: float) -> None:
        looks.append((done("train"), done("evaluate")))
        next(world)()

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=wait))
    outcomes = milestones(recipe, RunSettings(root=str(tmp_path)))
    assert [(each.step, each.name, each.state) for each in outcomes] == [
        (step, name, "ran") for step in STEPS for name in ("sample", "evaluate")
    ]
    assert looks == [(0, 0), (0, 0), (2, 2)]
    client = MlflowClient(mlflow_server.address)
    names = [
        client.get_run(str(Manifest.read(each.manifest).provenance.mlflow_run_id)).info.run_name for each in outcomes
    ]
    assert names == [f"{recipe.pipeline_id} {name} at step {step}" for step in STEPS for name in ("sample", "evaluate")]
    training = model_of(MetricsManifest.read(outcomes[-1].manifest))
    history = client.get_metric_history(training.provenance.mlflow_run_id, "milestone_fd")
    assert [metric.step for metric in history] == STEPS


@pytest.mark.parametrize("end", ["FAILED", pytest.param("KILLED", marks=pytest.mark.full)])
def test_another_worker_ends_with_a_training_that_ends_early(
    tmp_path: Path,
    digits: Path,
    prefect_api: str,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    """Also if its command was killed. What it had committed until then is evaluated."""
    # Another seed for each, as they share a server, where a training has one run.
    values = {"train.held_out": "null", "train.seed": ENDED_EARLY.index(end)}
    recipe, small, root = recipe_of(tmp_path, digits, **values), Small(tmp_path), str(tmp_path)
    latents = small.bring("encode", recipe.encode, small.bring("shard", recipe.shard, recipe.archive))
    asked = recipe.asked_over_training()
    client, experiment = runs.open_client(root)
    command = local_home(root) / processes.FOLDER / f"{'0' * 32}@{socket.gethostname()}"
    output = STAGES["train"].output(root, recipe.train, latents)
    run_id = store.create(client, experiment, output.header, command.name)

    def wait(_: float) -> None:
        small.bring("train", asked.configs(root)[10], latents)
        if end == "FAILED":
            client.set_terminated(run_id, end)
        else:
            command.touch()  # nobody holds its lock

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=wait))
    said = rf"^milestones: demo: training has ended \({end}\) before the steps \[20, 30\]; start it again, then this"
    processes.join(root)
    with pytest.raises(DitflowError, match=said):
        milestones(recipe, RunSettings(root=root))
    processes.leave(root)
    assert [len(list(tmp_path.glob(f"{stage}/*/manifest.json"))) for stage in ("train", "evaluate")] == [1, 1]


def test_another_worker_ends_with_a_pipeline_that_fails_before_training(
    tmp_path: Path, digits: Path, prefect_api: str, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there are latents, and when they are there. Until it has failed the worker waits."""
    recipe, small = recipe_of(tmp_path, digits, **{"train.held_out": "null", "train.seed": 7}), Small(tmp_path)
    root, looks = str(tmp_path), list[float]()

    def fail(seconds: float) -> None:
        looks.append(seconds)
        with pytest.raises(ValueError, match="a stage"), runs.pipeline_run(recipe.pipeline_id, root):
            raise ValueError("a stage")

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=fail))
    processes.join(root)
    with pytest.raises(DitflowError, match=r"^milestones: demo: pipeline has ended \(FAILED\) before training; start"):
        milestones(recipe, RunSettings(root=root))
    assert len(looks) == 1
    small.bring("encode", recipe.encode, small.bring("shard", recipe.shard, recipe.archive))
    with pytest.raises(DitflowError, match=r"pipeline has ended \(FAILED\) before the steps \[10, 20, 30\]; start it"):
        milestones(recipe, RunSettings(root=root))
    processes.leave(root)
    assert len(looks) == 1


@pytest.mark.full
def test_a_kill_between_two_of_them_costs_neither(
    tmp_path: Path, digits: Path, prefect_api: str, mlflow_server: MlflowServer
) -> None:
    given = arguments("run", tmp_path, digits, *SETS)
    killed = subprocess.run([sys.executable, "-c", KILLED, "evaluate", *given], check=False)
    assert killed.returncode == -signal.SIGKILL
    again = reported("run", tmp_path, digits, *SETS)
    first = ("shard", "encode", ENCODE_HELD_OUT, "train")
    assert states(again) == {name: "skipped" if name in first else "ran" for name in EVERYTHING}
    expected = [(step, name, "skipped" if step == 10 else "ran") for step in STEPS for name in ("sample", "evaluate")]
    assert [(each["step"], each["name"], each["state"]) for each in again["milestones"]] == expected
    assert [step for step, _ in Made(tmp_path, again).history("milestone_fd")] == STEPS
