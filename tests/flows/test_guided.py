"""Samples guided by another model: their names, lineage, report, and the command."""

import shutil
from pathlib import Path

import pytest
from command_line import refused
from faults import MlflowServer
from pipelines import arguments
from small import SAMPLING, Small
from test_pipeline import reported, states

from dit.evaluate import MetricsManifest
from dit.metrics.comparison import differing
from dit.metrics.published import ROWS, deviations
from dit.sample import SampleManifest
from dit.samplers.config import SampleConfig
from flows.command.main import main
from flows.contract import STAGES
from flows.over_training import OverTraining
from flows.recipe import load_recipe
from flows.reevaluate import again
from flows.report import guidance_sweep, processes
from flows.tracking import runs
from flows.tracking.references import located
from storage.manifest import Manifest
from storage.verify import outputs

LATER = 3


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("root"), tracked=False)


@pytest.fixture(scope="module")
def latents(small: Small) -> Manifest:
    return small.latents()


@pytest.fixture(scope="module")
def bad(small: Small, latents: Manifest) -> Manifest:
    return small.checkpoint(latents)


@pytest.fixture(scope="module")
def good(small: Small, latents: Manifest) -> Manifest:
    return small.checkpoint(latents, steps=LATER)


@pytest.fixture(scope="module")
def metrics(small: Small, good: Manifest, bad: Manifest) -> MetricsManifest:
    return small.evaluated(good, guided(bad.url))


def guided(guide: str, **fields: object) -> SampleConfig:
    return SampleConfig.model_validate(SAMPLING.model_dump() | {"guide": guide} | fields)


def test_one_content_is_one_output_wherever_the_guide_lies(
    small: Small, good: Manifest, bad: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(bad.uri, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    root, real = str(small.root), runs.resolve
    named = {"models:/m@champion": bad.url}
    monkeypatch.setattr(runs, "resolve", lambda given, root: named.get(given) or real(given, root))
    sources = [bad.uri, bad.url, str(copy), "copy", "models:/m@champion"]
    names = {STAGES["sample"].output(root, located(guided(source), root), good).uri for source in sources}
    assert len(names) == 1
    others = [SAMPLING, guided(good.uri), guided(bad.uri, guide_weights="raw"), guided(bad.uri, guidance_scale=3)]
    assert not names & {STAGES["sample"].output(root, config, good).uri for config in others}


def test_a_finished_evaluation_over_training_is_found_by_the_name_of_its_guide(
    small: Small,
    latents: Manifest,
    good: Manifest,
    bad: Manifest,
    metrics: MetricsManifest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "resolve", lambda given, root: {"models:/m@champion": bad.url}.get(given, given))
    recipe = load_recipe("demo", [])
    train = recipe.train.model_validate(good.config)
    assert recipe.evaluate is not None
    evaluate = recipe.evaluate.model_validate(metrics.config)
    asked = OverTraining(train, guided("models:/m@champion"), evaluate)
    (found,) = asked.evaluations(str(small.root), latents).values()
    assert found is not None
    assert found.digest == metrics.digest


def test_a_registered_guide_guides_without_a_recipe_too(
    good: Manifest, bad: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "resolve", lambda given, root: {"models:/m@champion": bad.url}.get(given, given))
    sets = ("sample.count=2", "sample.steps=2", "sample.guidance_scale=3")
    arguments = ["sample", "--checkpoint", good.uri, *(part for each in sets for part in ("--set", each))]
    for name, more in {"named": ["models:/m@champion"], "there": [bad.uri], "alone": []}.items():
        guide = [part for each in more for part in ("--set", f"sample.guide={each}")]
        assert main([*arguments, *guide, "--out", str(tmp_path / name)]) == 0, capsys.readouterr().err
    named, there, alone = ((tmp_path / name / "samples.png").read_bytes() for name in ("named", "there", "alone"))
    assert named == there != alone


def test_lineage_leads_to_the_guide(bad: Manifest, good: Manifest, metrics: MetricsManifest) -> None:
    chain = {found.uri for found in outputs(metrics.uri) if isinstance(found, Manifest)}
    assert {bad.uri, good.uri} <= chain
    shutil.move(bad.uri, f"{bad.uri}-gone")
    try:
        (broken,) = [found for found in outputs(metrics.uri) if not isinstance(found, Manifest)]
        assert Path(bad.uri).name in str(broken)
    finally:
        shutil.move(f"{bad.uri}-gone", bad.uri)


def test_samples_are_drawn_again_with_the_guide_of_a_root_that_was_moved(
    bad: Manifest, metrics: MetricsManifest, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(metrics.root, tmp_path / "moved"))
    there = metrics.parent("samples", SampleManifest).uri
    samples = SampleManifest.read(str(moved / "sample" / Path(there).name))
    assert again(samples, 7) == guided(bad.uri, seed=7)
    shutil.move(bad.uri, f"{bad.uri}-gone")
    try:
        assert again(samples, 7) == guided(str(moved / "train" / Path(bad.uri).name), seed=7)
    finally:
        shutil.move(f"{bad.uri}-gone", bad.uri)


def test_numbers_with_and_without_a_guide_are_not_compared(
    small: Small, bad: Manifest, good: Manifest, metrics: MetricsManifest
) -> None:
    plain = small.evaluated(good)
    assert differing(plain.conditions, metrics.conditions) == ["guide", "guide_training_steps", "guide_weights"]
    row = next(row for row in ROWS if row.conditions.get("guidance_scale") == 1.5)
    assert "guide none" in deviations(row, metrics.conditions)
    assert "guide none" not in deviations(row, plain.conditions)
    _, ((_, _, guidance, *_),) = processes.table([metrics])
    assert guidance.endswith(f"guide {bad.digest[:16]}, guide_weights ema, guide_training_steps 2")
    scale_1 = small.evaluated(good, guided(bad.url, guidance_scale=1))
    assert scale_1.digest == small.evaluated(good, SAMPLING.model_copy(update={"guidance_scale": 1.0})).digest
    among = guidance_sweep.sweep_of(metrics, str(small.root))
    assert {each.digest for each in among} == {each.digest for each in (plain, metrics, scale_1)}
    lines = {line.name: line.scales for line in guidance_sweep.lines(among)}
    alone, other = "channels all, schedule constant", f"guide {bad.digest[:16]}, guide_weights ema"
    assert lines == {alone: [1.0, 2.0], f"{alone}, {other}": [1.0, 2.0]}


MILESTONES = ("--set", "train.milestones=10", "--set", "train.held_out=null", "--set", "evaluate=null")


@pytest.mark.full
def test_a_milestone_guides_the_last_step(
    tmp_path: Path, digits: Path, prefect_api: str, mlflow_server: MlflowServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user runs it: first the pipeline, then samples that its milestone guides, whose chain is sound."""
    assert set(states(reported("run", tmp_path, digits, *MILESTONES)).values()) == {"ran"}
    models = [Manifest.read(str(folder)) for folder in (tmp_path / "train").iterdir()]
    (milestone,) = [model for model in models if model.counts["steps"] == 10]
    asked = ("--set", f"sample.guide={milestone.uri}", "--set", "sample.guidance_scale=2", *MILESTONES)
    report = reported("run", tmp_path, digits, *asked)
    before = dict.fromkeys(("shard", "encode", "train"), "skipped")
    assert states(report) == before | {"sample": "ran", "register": "ran"}
    samples = SampleManifest.read(report["stages"][-2]["manifest"])
    assert samples.conditions["guide"] == milestone.digest
    run_id = report["mlflow_run_ids"]["train"]
    again = reported("run", tmp_path, digits, *asked[:1], f"sample.guide={run_id}", *asked[2:])
    assert SampleManifest.read(again["stages"][-2]["manifest"]).inputs["guide"] != milestone.digest
    assert states(reported("run", tmp_path, digits, *asked))["sample"] == "skipped"
    capsys.readouterr()
    assert main(["verify", "--full", samples.uri]) == 0
    assert f"{milestone.uri}: " in capsys.readouterr().out


def test_a_guide_that_is_missing_is_found_before_anything_runs(
    tmp_path: Path, digits: Path, prefect_api: str, mlflow_server: MlflowServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("run", "plan"):
        asked = arguments(name, tmp_path, digits, "--set", f"sample.guide={tmp_path}/gone")
        line = refused(capsys, [each for each in asked if name == "run" or each != "--json"])
        assert f"sample.guide: {tmp_path}/gone: no finished output" in line
    assert not any((tmp_path / stage).exists() for stage in STAGES)
