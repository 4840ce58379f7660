"""What a model takes from another one, by configs and shapes alone, and where weights come from."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from random_dit import SMALL, pretrained, random_dit

from dit.convert import write
from dit.diffusion.config import DiffusionConfig, EDMConfig, FlowConfig, ProcessConfig
from dit.models.build import build
from dit.models.config import DiffiTConfig, DiTConfig, ModelConfig, diffit_image_config
from dit.training.config import Init
from dit.training.origin import Fit, Origin, check_fit, fit, inputs, learned_the_same, open_origin, resized, take
from storage.errors import InputError

BASE = DiTConfig(**SMALL | {"num_classes": 3})
NAMES = ("cat", "dog", "owl")
TABLE = "y_embedder.embedding_table.weight"


def source(model: ModelConfig, names: tuple[str, ...] | None = NAMES) -> Origin:
    torch.manual_seed(1)
    state = {name: torch.randn_like(tensor) for name, tensor in build(model).state_dict().items()}
    return Origin("there", model, DiffusionConfig(), names, None, lambda: state)


def changed(model: ModelConfig = BASE, **fields: Any) -> ModelConfig:
    return type(model).model_validate(dict(model) | fields)


def taken(origin: Origin, config: ModelConfig, found: Fit) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a new model before and after it has taken what fits."""
    torch.manual_seed(0)
    model = build(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    take(model, origin, found)
    return before, model.state_dict()


def test_all_weights_of_the_same_model() -> None:
    origin = source(BASE)
    found = fit(origin, BASE, NAMES)
    assert found.other == {}
    before, after = taken(origin, BASE, found)
    assert all(torch.equal(after[name], tensor) for name, tensor in origin.read().items() if name != "pos_embed")
    assert torch.equal(after["pos_embed"], before["pos_embed"])


def test_rows_of_classes_by_their_names_and_the_null_label() -> None:
    origin = source(BASE)
    found = fit(origin, changed(num_classes=2), ("owl", "yak"))
    assert found.other == {TABLE: "new classes yak"}
    before, after = taken(origin, changed(num_classes=2), found)
    theirs = origin.read()[TABLE]
    assert torch.equal(after[TABLE], torch.stack([theirs[2], before[TABLE][1], theirs[3]]))


def test_fewer_classes_fit() -> None:
    found = fit(source(BASE), changed(num_classes=1), ("dog",))
    assert (found.other, found.rows) == ({}, {0: 1, 1: 3})


def test_without_names_as_many_classes_are_the_same_and_others_are_not() -> None:
    found = fit(source(BASE, None), BASE, ("x", "y", "z"))
    assert (found.other, found.rows) == ({}, {0: 0, 1: 1, 2: 2, 3: 3})
    found = fit(source(BASE, None), changed(num_classes=2), ("x", "y"))
    assert (found.other, found.rows) == ({TABLE: "3 classes without names there, 2 here"}, {2: 3})


def test_many_new_classes_are_counted() -> None:
    names = tuple(f"c{number}" for number in range(1005))
    assert fit(source(BASE), changed(num_classes=1005), names).other == {TABLE: "new classes c0, c1, c2 and 1,002 more"}


@pytest.mark.parametrize(
    ("model", "fields", "names"),
    [
        (BASE, {"in_channels": 8}, {"x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"}),
        (BASE, {"learn_variance": False}, {"final_layer.linear.weight", "final_layer.linear.bias"}),
        (BASE, {"num_classes": 0}, {TABLE}),
        (BASE, {"input_size": 8}, set()),
        (
            diffit_image_config("digits16"),
            {"in_channels": 1},
            {"tokenizer.weight", "head.2.weight", "head.2.bias"},
        ),
        (diffit_image_config("digits16"), {"augmented": True}, {"t_embedder.augment.weight"}),
        (diffit_image_config("digits16"), {"input_size": 32, "window": 8}, set()),
    ],
)
def test_what_does_not_fit_is_named_and_made_new(model: ModelConfig, fields: dict[str, Any], names: set[str]) -> None:
    origin, config = source(model, NAMES), changed(model, **fields)
    found = fit(origin, config, NAMES)
    assert found.other.keys() == names
    before, after = taken(origin, config, found)
    assert all(torch.equal(after[name], before[name]) for name in names & after.keys())
    assert all(torch.equal(after[name], origin.read()[name]) for name in found.same)
    assert len(found.same) > 20
    if names:
        init = Init(source="there")
        with pytest.raises(InputError) as caught:
            check_fit(found, init)
        assert str(caught.value).startswith("train.init: there does not fit: ")
        assert all(name in str(caught.value) for name in names)
        assert "\n" not in str(caught.value)
        check_fit(found, init.model_copy(update={"mismatch": "reinitialise"}))


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (changed(depth=2), "there has depth 3, and the model to train 2"),
        (changed(heads=2), "there has heads 4, and the model to train 2"),
        (changed(width=32), "there has width 64, and the model to train 32"),
        (changed(block="adaln"), "there has block adaln_zero, and the model to train adaln"),
        (DiffiTConfig(**SMALL), "there has kind dit, and the model to train diffit"),
    ],
)
def test_another_kind_or_size_is_always_refused(config: ModelConfig, line: str) -> None:
    with pytest.raises(InputError, match=line):
        fit(source(BASE), config, NAMES)


def bilinear(table: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """By NumPy's interpolation along rows, then along columns."""
    before, heads = round(len(table) ** 0.5), table.shape[1]
    at, grid = np.linspace(0, before - 1, side), table.reshape(before, before, heads)
    for axis in (0, 1):
        grid = np.apply_along_axis(lambda line: np.interp(at, np.arange(before), line), axis, grid)
    return grid.reshape(side * side, heads)


@pytest.mark.parametrize(("before", "after"), [(7, 15), (15, 7), (7, 7), (1, 3)])
def test_bias_tables_are_interpolated(before: int, after: int) -> None:
    table = torch.randn(before**2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    found = resized(table, after**2)
    np.testing.assert_allclose(found.numpy(), bilinear(table.double().numpy(), after), atol=1e-5)
    assert torch.equal(found[len(found) // 2], table[len(table) // 2])  # of a token and itself


def test_the_tables_of_another_latent_size() -> None:
    config = DiffiTConfig(**SMALL | {"num_classes": 3})
    origin, larger = source(config), changed(config, input_size=32)
    found = fit(origin, larger, NAMES)
    assert (found.other, len(found.resized)) == ({}, 3)
    _, after = taken(origin, larger, found)
    for name in found.resized:
        assert torch.equal(after[name], resized(origin.read()[name], 31**2))


def test_a_file_in_the_published_layout_with_another_number_of_classes(tmp_path: Path) -> None:
    theirs = random_dit()
    write(pretrained(theirs), str(tmp_path / "a.pt"), "reference")
    init, config = Init(source=str(tmp_path / "a.pt")), changed(num_classes=4)
    origin = open_origin(init, config)
    found = fit(origin, config, ("n", "e", "s", "w"))
    assert found.other == {TABLE: "10 classes without names there, 4 here"}
    before, after = taken(origin, config, found)
    assert torch.equal(after[TABLE], torch.cat([before[TABLE][:4], theirs.state_dict()[TABLE][10:]]))
    assert torch.equal(after["blocks.2.mlp.fc1.weight"], theirs.state_dict()["blocks.2.mlp.fc1.weight"])


def test_the_heads_of_a_published_width_are_not_guessed(tmp_path: Path) -> None:
    write(pretrained(random_dit(width=384, depth=1, heads=6)), str(tmp_path / "a.pt"), "reference")
    config = DiTConfig(**SMALL | {"width": 384, "depth": 1, "heads": 12})
    with pytest.raises(InputError, match="has heads 6, and the model to train 12"):
        fit(open_origin(Init(source=str(tmp_path / "a.pt")), config), config, ())


def test_the_content_of_others_is_the_input_and_not_the_place(tmp_path: Path) -> None:
    model = pretrained(random_dit())
    write(model, str(tmp_path / "a.pt"), "reference")
    write(model, str(tmp_path / "folder"), "diffusers")
    shutil.copy(tmp_path / "a.pt", tmp_path / "b.pt")
    shutil.copytree(tmp_path / "folder", tmp_path / "moved" / "transformer")
    (tmp_path / "moved" / "model_index.json").write_text("{}")
    digests = {name: inputs(Init(source=str(tmp_path / name))) for name in ("a.pt", "b.pt", "folder", "moved")}
    assert digests["a.pt"] == digests["b.pt"] != digests["folder"] == digests["moved"]
    write(pretrained(random_dit(depth=2)), str(tmp_path / "c.pt"), "reference")
    assert inputs(Init(source=str(tmp_path / "c.pt"))) != digests["a.pt"]
    assert inputs(None) == {}


@pytest.mark.parametrize("name", ["gone.pt", "gone", "empty"])
def test_a_source_that_is_none_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name) as caught:
        inputs(Init(source=str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_others_have_no_further_averages(tmp_path: Path) -> None:
    write(pretrained(random_dit()), str(tmp_path / "a.pt"), "reference")
    with pytest.raises(InputError, match=r"train\.init\.weights: .*a\.pt was not trained here"):
        open_origin(Init(source=str(tmp_path / "a.pt"), weights="raw"), BASE)


@pytest.mark.parametrize(
    ("theirs", "ours", "same"),
    [
        (FlowConfig(), FlowConfig(times="logit_normal", cosine=1.0), True),
        (FlowConfig(), FlowConfig(path="gvp"), False),
        (FlowConfig(predict="noise"), FlowConfig(), False),
        (DiffusionConfig(), FlowConfig(), False),
        (DiffusionConfig(), DiffusionConfig(beta_end=0.03), False),
        (EDMConfig(), EDMConfig(), True),
    ],
)
def test_what_a_network_learned_does_not_depend_on_the_times_of_its_training(
    theirs: ProcessConfig, ours: ProcessConfig, same: bool
) -> None:
    assert learned_the_same(theirs, ours) == same
