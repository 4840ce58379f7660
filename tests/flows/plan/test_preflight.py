"""What would stop a pipeline after hours stops ``ditflow run`` before it writes anything."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from command_line import refused, tiny, write_images
from launching import TINY, write_latents

from flows.contract import STAGES
from flows.launch import kubernetes, start
from flows.launch.spec import LocalLaunch, SlurmLaunch
from flows.plan.estimate import plan
from flows.plan.preflight import preflight
from flows.recipe import Recipe, load_recipe
from flows.registry.config import RegisterConfig
from storage.errors import InputError
from storage.tracker import NullTracker

RATES = dict.fromkeys(("shard", "encode", "train", "sample", "decode", "evaluate"), 1.0)
usage = namedtuple("usage", "total used free")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def recipe_of(images: Path, root: Path | str, *more: str) -> Recipe:
    return load_recipe("demo", tiny(images, root, *more)[3::2], str(root))


def written(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["sample.count=3"], "evaluate: metrics need at least 4 reference images and samples, not 24 and 3"),
        (["sample.sampler=heun"], "sample.sampler: heun does not fit the model's process; use ddpm, ddim or dpm"),
        (["sample.steps=1001"], "steps: '1001' is neither a number from 2 to 1000"),
        (
            ["sample.guidance_interval=[600, 100]"],
            "sample.guidance_interval: [600.0, 100.0] is empty; write the lowest",
        ),
        (["sample.weights=ema-0.5"], "sample.weights: the model has no model-ema-0.5.safetensors for ema-0.5; it has"),
        (["train.model.label_dropout=0"], "the model has no null label to guide with; use 1"),
        (["train.flips=true", "encode.flips=false"], "train.flips: the latents have no mirror images"),
        (["train.augmentation=0.1"], "train.augmentation"),
        (["train.batch_size=5", "launch.nproc=2"], "train.batch_size: 5 is not a multiple of the 2 ranks"),
        (["train.model.patch_size=3"], "train.model: does not fit the latents"),
        (["train.held_out={}"], "train.held_out: needs held-out images; name them in archive.held_out"),
        (["encode.split=test"], "encode.split: the data has no split 'test'"),
        (["encode.resolution=18"], "encode.resolution: 18 px is not a multiple of the VAE's 4"),
        (["encode.resolution=64"], "demo-digits: needs square uint8 images of at most 32x32x3"),
        (
            ["train.milestones=1", "evaluate_milestones.sample.weights=ema-0.5"],
            "sample.weights: the model has no model-ema-0.5.safetensors for ema-0.5; it has",
        ),
        (
            ["train.milestones=1", "evaluate_milestones.sample.count=3"],
            "evaluate: metrics need at least 4 reference images and samples, not 24 and 3",
        ),
        (["registry.alias=latest"], "registry.alias: MLflow refuses it: "),
        (["registry.alias=v2"], "registry.alias: MLflow refuses it: Version alias name 'v2' is reserved."),
        (["registry.model_name=.."], "registry.model_name: MLflow refuses it: "),
        (["registry.model_name=' '"], "registry.model_name: MLflow refuses it: "),
        (["shard.runner={kind: ray}"], "shard.runner: ray needs prefect-ray here and on its workers; pip install"),
    ],
)
def test_what_does_not_fit(
    capsys: pytest.CaptureFixture[str], images: Path, root: Path, values: list[str], said: str
) -> None:
    assert said in refused(capsys, ["run", "demo", *tiny(images, root, *values)])
    assert written(root) == []


def test_a_model_that_would_be_measured_on_what_it_is_trained_on(
    capsys: pytest.CaptureFixture[str], images: Path, root: Path
) -> None:
    values = ["train.held_out={}", f"archive.held_out={images}", "encode.split=held_out"]
    said = "train.held_out: the model is trained on the held-out images; encode the split train, or null"
    assert said in refused(capsys, ["run", "demo", *tiny(images, root, *values)])
    assert written(root) == []


def test_too_few_reference_images(capsys: pytest.CaptureFixture[str], tmp_path: Path, root: Path) -> None:
    few = write_images(tmp_path / "few", classes=1, count=3)
    line = refused(capsys, ["run", "demo", *tiny(few, root)])
    assert "metrics need at least 4 reference images and samples, not 3 and 6" in line
    assert written(root) == []


def test_weights_that_do_not_load(capsys: pytest.CaptureFixture[str], images: Path, root: Path, tmp_path: Path) -> None:
    """They are hashed before the first stage anyway, but loaded by the stage that uses them."""
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(1)}, other)
    values = [f"evaluate.extractor.weights={other}", "evaluate.extractor.sha256=null"]
    assert f"{other}: not the weights of" in refused(capsys, ["run", "demo", *tiny(images, root, *values)])
    shutil.copytree(load_recipe("demo").encode.vae.source, tmp_path / "vae")  # type: ignore[union-attr]
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    values = [f"encode.vae.source={tmp_path / 'vae'}", "encode.vae.sha256=null"]
    assert f"{tmp_path / 'vae'}: config.json or" in refused(capsys, ["run", "demo", *tiny(images, root, *values)])
    assert written(root) == []


def test_a_disk_that_is_full(
    capsys: pytest.CaptureFixture[str], images: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    line = refused(capsys, ["run", "demo", *tiny(images, root, "train.checkpoint_every=1")])
    assert f"{root}: 0.1 GB to write, 0.0 GB are free; name a larger --root" in line
    assert written(root) == []


def test_a_cache_that_is_full(images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 10))
    there = "memory://preflight"
    with pytest.raises(InputError, match=rf"^{tmp_path / 'cache/ditflow'}: .* of latents to copy here for training"):
        preflight(recipe_of(images, there), there)
    nodes = "launch={kind: nodes, nodes: 2, nproc: 1, address: 'a:1'}"
    preflight(recipe_of(images, there, nodes), there)  # whose disks are others


def test_a_disk_that_does_not_tell_its_size(images: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
    preflight(recipe_of(images, root), str(root))


def test_every_recipe_of_a_sweep_is_checked_before_the_first_runs(
    capsys: pytest.CaptureFixture[str], images: Path, root: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("name: sweep\nbase: demo\nvary:\n  sample.steps: [2, 1001]\n")
    assert "steps: '1001'" in refused(capsys, ["run", str(sweep), *_without(tiny(images, root), "sample.steps=2")])
    assert written(root) == []


def _without(options: list[str], value: str) -> list[str]:
    place = options.index(value)
    return options[: place - 1] + options[place + 1 :]


def test_a_recipe_that_fits_passes_and_nothing_is_written(images: Path, root: Path) -> None:
    preflight(recipe_of(images, root), str(root))
    assert written(root) == []


def test_what_is_done_is_neither_checked_nor_counted(images: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(images, root, "shard.runner={kind: ray}")
    stage = STAGES["shard"]
    out = stage.output(str(root), recipe.shard, recipe.archive)
    stage.run(recipe.shard, recipe.archive, out=out, tracker=NullTracker())
    preflight(recipe, str(root))  # without a word about Ray
    size = sum(line.missing for line in plan(recipe, str(root), RATES).lines)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, size))
    preflight(recipe, str(root))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, size - 1))
    with pytest.raises(InputError, match="GB to write"):
        preflight(recipe, str(root))


def test_ranks_elsewhere_need_their_command(monkeypatch: pytest.MonkeyPatch, images: Path, root: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(InputError, match="launch: no sbatch on the path"):
        preflight(recipe_of(images, root, "launch={kind: slurm, nodes: 1}"), str(root))
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/sbatch")
    with pytest.raises(InputError, match=r"launch\.folder: the output is remote"):
        start.check(SlurmLaunch(kind="slurm", nodes=1), "memory://root")
    start.check(SlurmLaunch(kind="slurm", nodes=1, folder=str(root)), "memory://root")
    start.check(LocalLaunch(), str(root), force=True)
    later = recipe_of(images, root, "launch={kind: slurm, wait: false}")
    preflight(later, str(root))
    with pytest.raises(InputError, match="force: with launch.wait: false each look would begin anew"):
        preflight(later, str(root), force=True)


def test_pods_need_kubectl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(InputError, match="launch: no kubectl on the path"):
        kubernetes.check()


def test_names_that_mlflow_takes(images: Path, root: Path) -> None:
    config = RegisterConfig(model_name="a model.v2 (ü)", alias="latest-1")
    STAGES["register"].definition.check(config, None, None)  # type: ignore[arg-type]


def test_the_deployed_pipeline_finds_it_too(images: Path, root: Path, prefect_api: str) -> None:
    from flows.perform import RunSettings
    from flows.pipeline import pipeline

    with pytest.raises(InputError, match="use ddpm, ddim or dpm"):
        pipeline(recipe_of(images, root, "sample.sampler=heun"), RunSettings(root=str(root)))
    assert [path.parent.name for path in written(root)] == ["running"]  # which this process leaves at its end


def test_a_stage_by_itself_is_not_forced_anew_at_each_look(root: Path, prefect_api: str) -> None:
    from flows.perform import RunSettings
    from flows.stages import stage_flow

    latents = write_latents(root).url
    later = SlurmLaunch(kind="slurm", wait=False)
    with pytest.raises(InputError, match="force: with launch.wait: false each look would begin anew"):
        stage_flow("train")(
            latents=latents, config=TINY, launcher=later, settings=RunSettings(root=str(root), force=True)
        )
    assert not (root / "train").exists()


def test_the_plan_finds_it_too(capsys: pytest.CaptureFixture[str], images: Path, root: Path) -> None:
    assert "use ddpm, ddim or dpm" in refused(capsys, ["plan", "demo", *tiny(images, root, "sample.sampler=heun")])
