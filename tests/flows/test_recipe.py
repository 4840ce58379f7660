import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dit.diffusion.config import FlowConfig
from dit.models.choice import DataSpec
from dit.models.cost import cost
from dit.training.config import TrainConfig
from flows.recipe import Recipe, load_recipe
from flows.recipe_file import RECIPES
from storage.config import added, operational
from storage.errors import InputError


def chunk_bytes(recipe: Recipe) -> int:
    """Bytes of a chunk of latents in float16: of Stable Diffusion's autoencoder, or of one that is 16 times smaller."""
    channels, factor = (32, 16) if recipe.name.endswith("lightning") else (4, 8)
    return recipe.encode.chunk_rows * channels * (recipe.encode.resolution // factor) ** 2 * 2


@pytest.mark.parametrize(
    ("name", "model", "batch", "rate", "images", "sampler", "steps", "scale"),
    [
        ("imagenet256-dit", "dit", 256, 1e-4, 1792e6, "ddpm", 250, 1.5),
        ("imagenet512-dit", "dit", 256, 1e-4, 768e6, "ddpm", 250, 1.5),
        ("imagenet256-diffit", "diffit", 256, 3e-4, 1792e6, "ddpm", 250, 4.4),
        ("imagenet512-diffit", "diffit", 512, 1e-4, 1536e6, "ddpm", 250, 1.49),
        ("imagenet256-sit", "dit", 256, 1e-4, 1792e6, "euler_maruyama", 250, 1.5),
        ("imagenet512-sit", "dit", 256, 1e-4, 768e6, "euler_maruyama", 250, 1.5),
        ("imagenet256-lightning", "dit", 1024, 2e-4, 81.92e6, "euler", 250, 10.0),
        ("cifar10-diffit", "diffit_image", 512, 1e-3, 200e6, "heun", 18, None),
        ("ffhq64-diffit", "diffit_image", 256, 2e-4, 200e6, "heun", 40, None),
    ],
)
def test_presets_have_the_papers_settings(
    name: str, model: str, batch: int, rate: float, images: float, sampler: str, steps: int, scale: float | None
) -> None:
    recipe = load_recipe(name)
    train, sample = recipe.train, recipe.sample
    assert (train.model.kind, train.batch_size, train.learning_rate) == (model, batch, rate)
    assert train.steps * train.batch_size == images
    assert (sample.sampler, sample.steps, sample.count) == (sampler, steps, 50_000)
    assert scale is None or sample.guidance_scale == scale
    if name.startswith("imagenet"):
        assert (chunk_bytes(recipe), recipe.encode.block_rows) == (2 << 20, 16 * recipe.encode.chunk_rows)
    if train.diffusion.kind == "edm":
        assert train.ema_decay == pytest.approx(0.5 ** (batch / 0.5e6), abs=1e-8)
        assert train.warmup_steps == int(10e6 / batch)


def test_the_lightning_recipe_is_the_papers_model_and_process() -> None:
    recipe = load_recipe("imagenet256-lightning")
    model = recipe.train.model.config(DataSpec(channels=32, side=16, num_classes=1000, learn_variance=False))
    assert cost(model).trained == 674_961_824
    assert (recipe.train.normalise, recipe.train.betas) == ("channel", (0.9, 0.95))
    assert recipe.train.diffusion == FlowConfig(times="logit_normal", cosine=1.0)
    assert (recipe.sample.shift, recipe.sample.guidance_interval) == (0.3, (0.11, 1.0))


def test_the_demo_as_a_flow_differs_in_process_sampler_and_guidance_alone() -> None:
    demo, flow = load_recipe("demo"), load_recipe("demo-flow")
    assert flow.train.diffusion.kind == "flow"
    assert flow.train.model_copy(update={"diffusion": demo.train.diffusion}) == demo.train
    method = {"sampler": demo.sample.sampler, "guidance_scale": demo.sample.guidance_scale}
    assert flow.sample.model_copy(update=method) == demo.sample
    for group in ("archive", "shard", "encode", "evaluate"):
        assert getattr(flow, group) == getattr(demo, group)


def test_a_recipe_without_an_extractor_registers_what_it_has_sampled() -> None:
    recipe = load_recipe("imagenet256-dit")
    assert recipe.stages == ("shard", "encode", "train", "sample", "register")
    assert (recipe.reads("register"), load_recipe("demo").reads("register")) == ("sample", "evaluate")
    with pytest.raises(InputError, match=r"evaluate: recipe imagenet256-dit has no evaluate; set evaluate.extractor"):
        recipe.config_of("evaluate")


def test_overrides_are_yaml_and_reach_into_groups() -> None:
    recipe = load_recipe("demo", ["train.steps=7", "encode.flips=false", "sample.vae={source: here}"])
    assert recipe.train.steps == 7
    assert recipe.encode.flips is False
    assert recipe.sample.vae is not None
    assert recipe.sample.vae.source == "here"


def test_recipe_dir_is_the_folder_of_the_file(tmp_path: Path) -> None:
    values = yaml.safe_load((RECIPES / "demo.yaml").read_text())
    values["encode"]["vae"]["source"] = "${recipe_dir}/my-vae"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    assert load_recipe(str(tmp_path / "mine.yaml")).encode.vae.source == str(tmp_path / "my-vae")


def test_home_is_the_root_however_it_is_called(tmp_path: Path) -> None:
    root = tmp_path / "my: runs #1"
    assert load_recipe("demo", root=str(root)).archive.train == f"{root}/digits/train"


def test_a_recipe_round_trips_through_json() -> None:
    recipe = load_recipe("demo")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_the_pipeline_id_follows_the_content() -> None:
    assert load_recipe("demo").pipeline_id == load_recipe("demo").pipeline_id
    others = ["train.steps=7", "train.log_every=7", "archive.train=/other", "train.init.source=/other"]
    assert len({load_recipe("demo", [other]).pipeline_id for other in [*others, "name=demo"]}) == 5


def test_the_pipeline_id_stays_when_a_version_adds_fields() -> None:
    class Later(TrainConfig):
        more: int | None = operational(None)
        other: int = added(3)

    before = load_recipe("demo")
    train = before.train.model_dump()
    now = before.model_copy(update={"train": Later.model_validate(train)})
    assert now.pipeline_id == before.pipeline_id
    changed = before.model_copy(update={"train": Later.model_validate(train | {"more": 1})})
    assert changed.pipeline_id != before.pipeline_id


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.stepz=3"], "--set train.stepz=3: train.stepz: no such key; did you mean train.steps?"),
        (["trian.steps=3"], "--set trian.steps=3: trian: no such key; did you mean train?"),
        (["launch={nproc: 2, kin: slurm}"], "launch.kin: no such key; did you mean launch.kind?"),
        (["train.model.patch_size=x"], "--set train.model.patch_size=x: train.model.patch_size: must be a number"),
        (["train.model={size: B}"], "--set train.model={size: B}: train.model: say which with `kind`"),
        (["train.model.size=M"], "--set train.model.size=M: train.model.size: Input should be 'S', 'B', 'L' or 'XL'"),
        (["train.steps=0"], "train.steps: Input should be greater than or equal to 1"),
        (["train.steps=many"], 'train.steps: must be a number, not the text "many"'),
        (["train.steps"], "--set train.steps: write key=value"),
        (["name.x=1"], "--set name.x=1: name is a value"),
        (["train.steps=[1"], "--set train.steps=[1: not YAML"),
        (["launch.nproc=-1"], "launch.nproc: Input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("demo", overrides)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_lists_the_presets() -> None:
    with pytest.raises(InputError, match=r"recipe 'imagenet265-dit': .*demo.*; did you mean imagenet256-dit\?"):
        load_recipe("imagenet265-dit")


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\n")
    with pytest.raises(InputError, match=r"bad\.yaml: archive: Field required"):
        load_recipe(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "{"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=r"bad\.yaml: (a recipe is a mapping|not YAML)"):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_recipes_are_read_before_prefect_reads_its_settings() -> None:
    script = "import sys, flows.recipe, flows.sweep; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
