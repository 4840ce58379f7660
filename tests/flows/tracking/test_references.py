"""Training that starts from another model: names, lineage, checks."""

import shutil
from pathlib import Path

import pytest
from small import Small

from dit.export import CheckpointManifest
from dit.training.config import Init, TrainConfig
from flows.contract import STAGES
from flows.recipe import load_recipe
from flows.tracking import runs
from flows.tracking.references import located
from storage.config import Config
from storage.errors import InputError
from storage.latents import LatentManifest
from storage.manifest import Manifest
from storage.verify import outputs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("root"), tracked=False)


@pytest.fixture(scope="module")
def latents(small: Small) -> Manifest:
    return small.latents()


@pytest.fixture(scope="module")
def base(small: Small, latents: Manifest) -> Manifest:
    return small.checkpoint(latents)


def starting_from(base: Manifest, source: str) -> TrainConfig:
    return TrainConfig.model_validate(base.config | {"init": {"source": source}})


def test_one_content_is_one_output_wherever_it_lies(
    small: Small, latents: Manifest, base: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(base.uri, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    sources = [base.uri, base.url, str(copy), "copy"]
    configs = [located(starting_from(base, source), str(small.root)) for source in sources]
    assert len({STAGES["train"].output(str(small.root), config, latents).uri for config in configs}) == 1
    assert configs[-1].init == Init(source=str(copy))


def test_lineage_leads_through_what_a_run_started_from(small: Small, latents: Manifest, base: Manifest) -> None:
    made = small.bring("train", starting_from(base, base.uri), latents)
    assert made.inputs == {"latents": latents.digest, "init": base.digest}
    chain = {found.uri for found in outputs(made.uri) if isinstance(found, Manifest)}
    shards = latents.parent("shards", Manifest)
    assert chain == {made.uri, base.uri, latents.uri, shards.uri}
    shutil.move(base.uri, f"{base.uri}-gone")
    try:
        (broken,) = [found for found in outputs(made.uri) if not isinstance(found, Manifest)]
        assert Path(base.uri).name in str(broken)
    finally:
        shutil.move(f"{base.uri}-gone", base.uri)
    again = small.bring("train", starting_from(base, made.uri), latents)
    assert again.parent("init", CheckpointManifest).digest == made.digest


def test_held_out_images_are_encoded_for_a_run_that_starts_from_a_registered_model(
    small: Small, latents: Manifest, base: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "resolve", lambda reference, root: {"models:/m@champion": base.url}[reference])
    recipe = load_recipe("demo", ["train.held_out={every: 1}", "train.init.source=models:/m@champion"])
    encoding = recipe.encoding_held_out(latents, str(small.root), force=False)
    assert encoding is not None
    assert encoding.encode.split == "held_out"


def test_the_output_of_another_stage_is_no_start(small: Small, latents: Manifest, base: Manifest) -> None:
    config = located(starting_from(base, latents.uri), str(small.root))
    with pytest.raises(InputError, match="an output of 'encode'; one of 'train' is needed"):
        STAGES["train"].output(str(small.root), config, latents)


def test_other_configs_stay_as_they_are(base: Manifest) -> None:
    plain = TrainConfig.model_validate(base.config)
    for config in (Config(), plain):
        assert located(config, "nowhere") is config


def test_a_model_that_does_not_fit_is_refused_before_training(
    small: Small, latents: LatentManifest, base: Manifest
) -> None:
    config = starting_from(base, base.uri)
    wrong = config.model_copy(update={"freeze": ("blok.*",)})
    definition = STAGES["train"].definition
    for bad, line in ((wrong, "train.freeze: blok"), (config.model_copy(update={"batch_size": 7}), "batch_size")):
        with pytest.raises(InputError, match=line):
            definition.check(bad, latents, plan(2))
    definition.check(config, latents, plan(1))


def plan(ranks: int) -> object:
    return type("Plan", (), {"world_size": ranks})()
