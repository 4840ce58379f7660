"""A DiffiT that sees its condition in the MLP or as a token trains, resumes and is sampled as any other."""

from pathlib import Path

import pytest
import tiny

from dit.models.choice import DiffiTChoice, Shape
from dit.models.config import ConditionKind
from dit.models.lora import Lora
from dit.training.config import Init, TrainConfig
from storage.errors import InputError
from storage.latents import LatentManifest


def training(condition: ConditionKind, **fields: object) -> TrainConfig:
    model = DiffiTChoice(size=Shape(depth=2, width=32, heads=2), condition=condition)
    return tiny.TRAINING.model_copy(update={"model": model, "steps": 6, "checkpoint_every": 2} | fields)


@pytest.mark.parametrize("condition", ["mlp", "token"])
def test_each_resumes_in_the_same_bits_and_samples(
    tmp_path: Path, latents: LatentManifest, condition: ConditionKind
) -> None:
    config = training(condition)
    whole = tiny.run_train(tmp_path / "whole", config, latents)
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path / "killed", config, latents, tiny.Killer(5))
    resumed = tiny.run_train(tmp_path / "killed", config, latents)
    assert tiny.objects(resumed) == tiny.objects(whole)
    assert resumed.card.model.model_dump()["condition"] == condition
    assert tiny.run_sample(tmp_path, tiny.SAMPLING, resumed).counts["images"] == tiny.SAMPLING.count


def test_a_model_starts_from_one_of_the_same_condition_with_adapters_and_from_no_other(
    tmp_path: Path, latents: LatentManifest
) -> None:
    origin = tiny.run_train(tmp_path / "origin", training("token"), latents)
    init = {"init": Init(source=origin.uri), "lora": Lora(rank=2)}
    adapted = tiny.run_train(tmp_path / "adapted", training("token", **init), latents)
    assert adapted.card.lora == Lora(rank=2)
    with pytest.raises(InputError, match="has condition token, and the model to train mlp; make them equal"):
        tiny.run_train(tmp_path / "other", training("mlp", **init), latents)
