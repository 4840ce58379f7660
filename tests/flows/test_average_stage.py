"""The stage ``average`` among the others: from the command, in a recipe, in the registry."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from flips import unnoticed
from mlflow import MlflowClient
from small import SHAPE, Small

from dit.average import AverageConfig
from dit.evaluate import MetricsManifest
from dit.export import CheckpointManifest
from dit.models.choice import DiTChoice
from dit.training.config import TrainConfig
from flows.command.main import main
from flows.contract import STAGES
from flows.demo import CLASSIFIER
from flows.plan.estimate import estimates
from flows.plan.preflight import preflight
from flows.recipe import load_recipe
from flows.registry.config import RegisterConfig
from flows.report.page import Shown, page
from flows.tracking import runs
from storage.errors import InputError
from storage.latents import LatentManifest
from storage.manifest import Manifest

STEPS, STD = 6, 0.08
TRAIN = TrainConfig(
    model=DiTChoice(size=SHAPE, patch_size=4), steps=STEPS, batch_size=8, ema_power=(0.05, 0.1), milestones=1
)
RECIPE = f"""
name: one
archive: {{train: "${{home}}/digits/train", held_out: "${{home}}/digits/held_out"}}
shard: {{images_per_shard: 50}}
encode: {{vae: null, resolution: 16, flips: false}}
train:
  {{model: {{kind: dit, size: {SHAPE.model_dump_json()}, patch_size: 4}}, steps: {STEPS}, batch_size: 8,
    ema_power: [0.05, 0.1], milestones: 1}}
sample:
  {{count: 30, labels: balanced, sampler: ddim, steps: 2, guidance_scale: 2, guidance_channels: all, batch_size: 30}}
evaluate: {{extractor: {{weights: {CLASSIFIER}}}, batch_size: 64}}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def trained(small: Small) -> Manifest:
    return small.bring("train", TRAIN, small.latents())


@pytest.fixture(scope="module")
def made(small: Small, trained: Manifest) -> Manifest:
    return small.bring("average", AverageConfig(std=STD), trained)


@pytest.fixture
def recipe(small: Small) -> str:
    path = small.root / "one.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_the_command_takes_a_run_or_a_recipe(
    small: Small,
    trained: Manifest,
    made: Manifest,
    recipe: str,
    prefect_api: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_id = trained.provenance.mlflow_run_id
    for given, std, state in ((trained.url, STD, "skipped"), (str(run_id), 0.07, "ran"), (recipe, 0.07, "skipped")):
        assert main(["average", given, "--std", str(std), "--root", str(small.root), "--json"]) == 0
        (stage,) = json.loads(capsys.readouterr().out)["stages"]
        assert (stage["name"], stage["state"]) == ("average", state)
        assert (stage["manifest"] == made.url) == (std == STD)
    found = Manifest.read(stage["manifest"])
    client = MlflowClient(runs.tracking_uri(str(small.root)))
    assert found.provenance.mlflow_run_id is not None
    artifacts = {entry.path for entry in client.list_artifacts(found.provenance.mlflow_run_id)}
    assert artifacts == {"coefficients.json", "manifest.json"}
    assert client.get_run(found.provenance.mlflow_run_id).data.metrics["profile_error"] < 0.1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--std", "0.3"], "average.std: Input should be less than 0.288"),
        ([], "average.std: Field required"),
        (["--std", "0.08", "--step", "0"], "average.step: Input should be greater than or equal to 1"),
        (["--std", "0.08", "--set", "sample.count=1"], "--set sample: without a recipe there is only average"),
    ],
)
def test_wrong_options_are_named(
    small: Small, trained: Manifest, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main(["average", trained.url, "--root", str(small.root), *more]) == 2
    assert said in capsys.readouterr().err


def test_in_a_recipe_it_takes_the_place_of_the_last_step(small: Small, made: Manifest, recipe: str) -> None:
    root = str(small.root)
    averaged = load_recipe(recipe, [f"average.std={STD}"], root)
    assert averaged.stages == ("shard", "encode", "train", "average", "sample", "evaluate", "register")
    assert averaged.source_of("sample", None, root) == made.url
    assert Manifest.read(str(averaged.source_of("average", None, root))).stage == "train"
    lines = {each.stage: each for each in estimates(averaged, root, {"sample": 1.0, "train": 1.0, "evaluate": 1.0})}
    assert lines["average"].finished
    assert lines["sample"].manifest.inputs["checkpoint"] == made.digest
    plain = load_recipe(recipe, [], root)
    assert plain.source_of("sample", None, root) != made.url
    assert STAGES["average"].name not in plain.stages
    with pytest.raises(InputError, match=r"average: recipe one has no average; set average\.std to go on"):
        plain.config_of("average")
    with pytest.raises(InputError, match=r"evaluate: recipe one has no evaluate; set evaluate\.extractor to go on"):
        load_recipe(recipe, ["evaluate=null"], root).config_of("evaluate")
    best = ["train.milestones=2", "evaluate_milestones={}", "registry.checkpoint=best", f"average.std={STD}"]
    with pytest.raises(InputError, match="average: takes the place of the best milestone"):
        load_recipe(recipe, best, root)


def test_no_flip_in_a_committed_file_goes_unnoticed(made: Manifest) -> None:
    assert unnoticed(made, each=20) == []


def test_a_recipe_that_cannot_make_it_is_refused_before_it_begins(small: Small, made: Manifest, recipe: str) -> None:
    rates = {"sample": 1.0, "train": 1.0, "evaluate": 1.0}
    for change, said in (
        ("train.ema_power=[]", "has tracked no averages"),
        (f"average.step={STEPS + 1}", "is after the last step of the run"),
    ):
        changed = load_recipe(recipe, [f"average.std={STD}", "train.seed=1", change], str(small.root))
        with pytest.raises(InputError, match=said):
            list(estimates(changed, str(small.root), rates))
    coming = load_recipe(recipe, [f"average.std={STD}", "train.seed=1"], str(small.root))
    lines = {each.stage: each for each in estimates(coming, str(small.root), rates)}
    assert not lines["average"].finished
    assert lines["average"].cost.size > 0


def test_a_report_says_that_an_average_is_shown(small: Small, trained: Manifest, made: Manifest) -> None:
    """And not the model of its last step, which is in the series over training."""
    latents = trained.parent("latents", LatentManifest)
    earlier = STAGES["train"].output(str(small.root), TRAIN.model_copy(update={"steps": 3}), latents)
    series = [small.evaluated(CheckpointManifest.read(model)) for model in (earlier.uri, trained.uri)]
    text = page(Shown("one", [small.evaluated(made)], str(small.root), series))
    assert f"Samples shown in the other sections: the average of width {STD} at step {STEPS}." in text


def test_a_registered_one_leads_back_to_it_also_in_a_root_that_was_moved(
    small: Small, trained: Manifest, made: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = small.evaluated(made)
    assert metrics.conditions["ema_std"] == STD
    config = RegisterConfig(model_name="averaged")
    version = small.registered(metrics, config)
    tags = MlflowClient(runs.tracking_uri(str(small.root))).get_model_version("averaged", "1").tags
    assert (tags["digest.checkpoint"], tags["digest.training"]) == (made.digest, trained.digest)
    reference = f"models:/averaged/{version.model_version}"
    assert runs.resolve(reference, str(small.root)) == made.url
    moved = shutil.copytree(small.root, tmp_path / "moved")
    shutil.rmtree(made.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", runs.tracking_uri(str(small.root)))
    assert runs.resolve(reference, str(moved)) == str(moved / "average" / Path(made.uri).name / "manifest.json")


WIDTHS = (STD, 0.1)
ASKED = ["--set", f"evaluate_widths={{stds: {list(WIDTHS)}, sample: {{count: 20}}}}"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_a_sweep_of_widths_is_evaluated_and_reported(
    small: Small, made: Manifest, recipe: str, prefect_api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("run", recipe, "--root", str(small.root), *ASKED)
    first = said(capsys, *arguments)
    assert {each["name"] for each in first["stages"]} == {"shard", "encode", "train", "sample", "evaluate", "register"}
    expected = [(std, name) for std in WIDTHS for name in ("average", "sample", "evaluate")]
    assert [(each["std"], each["name"]) for each in first["widths"]] == expected
    assert first["widths"][0]["manifest"] == made.url
    metrics = {each["std"]: MetricsManifest.read(each["manifest"]) for each in first["widths"][2::3]}
    assert [each.conditions["ema_std"] for each in metrics.values()] == list(WIDTHS)
    assert {each.counts["samples"] for each in metrics.values()} == {20}
    (page,) = (small.root / "reports").glob("*/report.html")
    best = min(WIDTHS, key=lambda std: metrics[std].estimate.value)
    text = page.read_text()
    assert "Width of the average" in text
    assert f"Best: width {best:g}, {metrics[best].distance} {metrics[best].estimate}." in text
    assert f"The averages end at step {STEPS}." in text
    shown = Manifest.read(str(page.parent)).parents.values()
    assert {each.digest for each in metrics.values()} <= {parent.digest for parent in shown}

    again = said(capsys, *arguments)
    assert {each["state"] for each in (*again["stages"], *again["widths"])} == {"skipped"}
    assert [(each["std"], each["metrics"]) for each in again["widths"]] == [
        (std, each.metrics) for std, each in metrics.items()
    ]
    assert main(["report", recipe, "--root", str(small.root), *ASKED]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    plan = said(capsys, "plan", recipe, "--root", str(small.root), *ASKED)
    states = {line["stage"]: line["state"] for line in plan["lines"]}
    assert {states[f"{name} x 2"] for name in ("average", "sample", "evaluate")} == {"done"}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["train.ema_power=[]"], "evaluate_widths: needs train.ema_power, the averages to make others from"),
        (["evaluate=null"], "evaluate_widths: needs evaluate.extractor"),
        (["evaluate_widths.stds=[]"], "evaluate_widths.stds: Tuple should have at least 1 item"),
        (["evaluate_widths.stds=[0.3]"], "evaluate_widths.stds.0: Input should be less than 0.288"),
        (["evaluate_widths.sample.count=0"], "evaluate_widths.sample.count: Input should be greater than"),
        (["evaluate_widths.step=7"], "evaluate_widths.step: 7 is after the last step of training, 6"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_named_in_one_line(recipe: str, changes: list[str], line: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(recipe, ["evaluate_widths.stds=[0.06, 0.1]", *changes])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_width_that_cannot_be_made_stops_the_recipe_before_it_begins(small: Small, recipe: str) -> None:
    asked = load_recipe(recipe, ["evaluate_widths.stds=[0.08, 0.28]", "train.seed=2"], str(small.root))
    with pytest.raises(InputError, match=r"average\.std: at step 6 the snapshots give a width of 0\.28 only to within"):
        preflight(asked, str(small.root))
