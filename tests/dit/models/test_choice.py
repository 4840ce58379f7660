from dataclasses import replace
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from dit.models.build import MODELS, AnyModelChoice
from dit.models.choice import DataSpec, DiffiTChoice, DiffiTImageChoice, DiTChoice, ImageShape, Shape
from dit.models.config import (
    IMAGE_SIZES,
    SIZES,
    ImageSize,
    Size,
    diffit_config,
    diffit_image_config,
    dit_config,
)
from storage.errors import InputError

LATENTS = DataSpec(channels=4, side=8, num_classes=3, learn_variance=True)
IMAGES = DataSpec(channels=3, side=32, num_classes=3, learn_variance=False)


def test_sizes_are_those_of_the_tables() -> None:
    assert set(get_args(Size)) == set(SIZES)
    assert set(get_args(ImageSize)) == set(IMAGE_SIZES)


@pytest.mark.parametrize("size", SIZES)
def test_data_and_process_decide_the_rest(size: Size) -> None:
    decided: dict[str, Any] = {"input_size": 8, "in_channels": 4, "num_classes": 3}
    dit = DiTChoice(size=size, patch_size=4, block="adaln", label_dropout=0.2)
    assert dit.config(LATENTS) == dit_config(f"{size}/4", block="adaln", label_dropout=0.2, **decided)
    assert DiffiTChoice(size=size).config(LATENTS) == diffit_config(f"{size}/2", **decided)
    fixed = DataSpec(channels=4, side=8, num_classes=3, learn_variance=False)
    assert DiTChoice(size=size).config(fixed).out_channels == 4


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_image_models_take_the_side_of_the_images(size: ImageSize) -> None:
    data = DataSpec(channels=3, side=64, num_classes=5, learn_variance=False)
    assert DiffiTImageChoice(size=size).config(data) == diffit_image_config(size, input_size=64, augmented=False)
    assert DiffiTImageChoice(size=size).config(replace(data, augmented=True)).augmented
    labelled = DiffiTImageChoice(size=size, conditional=True, dropout=0.3).config(data)
    assert (labelled.num_classes, labelled.dropout) == (5, 0.3)


def test_shapes_of_ones_own() -> None:
    shape = Shape(depth=2, width=16, heads=2, mlp_ratio=2)
    found = DiTChoice(size=shape).config(LATENTS)
    assert (found.depth, found.width, found.heads, found.mlp_ratio) == (2, 16, 2, 2)
    u = DiffiTImageChoice(size=ImageShape(widths=(32, 64), depths=(1, 2), window=4)).config(IMAGES)
    assert (u.widths, u.depths, u.window, u.dropout, u.input_size) == ((32, 64), (1, 2), 4, 0, 32)


def test_windows_that_do_not_divide_the_images_are_refused() -> None:
    data = DataSpec(channels=3, side=48, num_classes=0, learn_variance=False)
    with pytest.raises(ValidationError, match="4 resolutions with windows of 8 need a multiple of 64"):
        DiffiTImageChoice(size="ffhq64").config(data)


def test_only_image_models_can_be_told_of_augmentation() -> None:
    for choice in (DiTChoice(), DiffiTChoice()):
        with pytest.raises(InputError, match=r"train.augmentation: needs a diffit_image model"):
            choice.config(replace(LATENTS, augmented=True))


def test_kind_tells_them_apart() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyModelChoice)
    for kind, choice in (("dit", DiTChoice), ("diffit", DiffiTChoice), ("diffit_image", DiffiTImageChoice)):
        assert adapter.validate_python({"kind": kind}) == choice()
    with pytest.raises(ValidationError, match="kind"):
        adapter.validate_python({"size": "B"})


def test_a_choice_and_its_config_are_of_one_kind() -> None:
    kinds = [(model.choice.model_fields["kind"].default, model.config.model_fields["kind"].default) for model in MODELS]
    assert kinds == [("dit", "dit"), ("diffit", "diffit"), ("diffit_image", "diffit_image")]
