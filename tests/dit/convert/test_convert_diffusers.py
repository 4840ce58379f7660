"""Folders of diffusers' DiTTransformer2DModel: exact in both directions, and what diffusers computes with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from random_dit import pretrained, random_dit
from safetensors.torch import load_file, save_file

from dit.convert import read, write
from dit.convert.diffusers import CONFIG, WEIGHTS
from dit.convert.diffusers_pipeline import make_exact
from dit.models.dit import DiT
from storage.errors import InputError


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_dit()


@pytest.fixture
def folder(tmp_path: Path, model: DiT) -> Path:
    write(pretrained(model), str(tmp_path / "theirs"), "diffusers")
    return tmp_path / "theirs"


def refusal(source: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(str(source))
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    return message


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def configure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


@pytest.mark.parametrize("fields", [{}, {"learn_variance": False, "depth": 1}, {"in_channels": 3, "patch_size": 4}])
def test_there_and_back_is_the_same_to_the_bit(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = random_dit(**fields)
    write(pretrained(model), str(tmp_path / "x.safetensors"), "reference")
    write(read(str(tmp_path / "x.safetensors"), heads=4), str(tmp_path / "theirs"), "diffusers")
    found = read(str(tmp_path / "theirs"))
    assert found.config == model.config
    write(found, str(tmp_path / "back.safetensors"), "reference")
    before, after = load_file(tmp_path / "x.safetensors"), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_diffusers_itself_saves_is_read(tmp_path: Path, folder: Path, model: DiT) -> None:
    DiTTransformer2DModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    found = read(str(tmp_path / "again"))
    assert found.config == model.config
    assert all(torch.equal(found.state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_folder_of_the_first_days(tmp_path: Path, folder: Path, model: DiT) -> None:
    """The published pipeline names another class, keeps pickled weights and has them below transformer/."""
    configure(folder, _class_name="Transformer2DModel", norm_eps=1e-5)
    tensors = load_file(folder / WEIGHTS) | {"pos_embed.pos_embed": model.pos_embed.data}
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    (tmp_path / "pipeline").mkdir()
    folder.rename(tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    found = read(str(tmp_path / "pipeline"))
    assert found.config == model.config
    assert all(torch.equal(found.state[name], tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
def error(model: DiT, theirs: DiTTransformer2DModel, t: int) -> float:
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(t))
    times, labels = torch.full((2,), t), torch.tensor([3, 10])
    expected = model(x, times, labels)
    found = theirs(x, timestep=times, class_labels=labels, return_dict=False)[0]
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("t", [0, 37, 500, 999])
def test_what_diffusers_computes_is_exact_once_corrected(folder: Path, model: DiT, t: int) -> None:
    theirs = DiTTransformer2DModel.from_pretrained(folder)
    make_exact(theirs)
    assert error(model, theirs, t) < 1e-6


def test_what_diffusers_computes_is_off_by_a_known_amount_otherwise(folder: Path, model: DiT) -> None:
    stock = DiTTransformer2DModel.from_pretrained(folder)
    assert [error(model, stock, t) for t in (37, 500, 999)] == pytest.approx([0.0015, 0.026, 0.027], rel=0.1)


@pytest.mark.parametrize(
    "part", ["class_embedder.embedding_table", "timestep_embedder.linear_1", "timestep_embedder.linear_2"]
)
def test_a_block_with_its_own_embedder_is_refused(folder: Path, part: str) -> None:
    name = f"transformer_blocks.2.norm1.emb.{part}.weight"
    spoil(folder, lambda tensors: tensors[name].view(-1)[-1].add_(1e-6))
    assert f"{name} differs from transformer_blocks.0.norm1.emb.{part}.weight" in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name: Input should be 'DiTTransformer2DModel'"),
        ({"norm_type": "ada_norm_single"}, "norm_type: Input should be 'ada_norm_zero'"),
        ({"activation_fn": "gelu"}, "activation_fn: Input should be 'gelu-approximate'"),
        ({"attention_bias": False}, "attention_bias: Input should be True"),
        ({"out_channels": 5}, "out_channels 5 is neither in_channels nor twice as many"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 8}, "is torch.float32 (384,), not floats (768,)"),
        ({"num_attention_heads": 5, "attention_head_dim": 3}, "width 15 is not a multiple of 4"),
        ({"num_layers": 2}, "unknown tensor transformer_blocks.2."),
        ({"num_layers": 4}, "no tensor transformer_blocks.3."),
        ({"num_embeds_ada_norm": 9}, "y_embedder.embedding_table.weight"),
    ],
)
def test_a_config_that_contradicts_is_refused(folder: Path, fields: dict[str, Any], reason: str) -> None:
    configure(folder, **fields)
    assert reason in refusal(folder)


def test_broken_folders_are_refused(folder: Path) -> None:
    name = "transformer_blocks.1.attn1.to_k.weight"
    spoil(folder, lambda tensors: tensors.update({name: torch.zeros(64, 32)}))
    assert f"{name} is of another shape" in refusal(folder)
    (folder / WEIGHTS).write_bytes(b"")
    assert f"{folder / WEIGHTS}: is empty" in refusal(folder)
    (folder / WEIGHTS).unlink()
    assert f"{folder / WEIGHTS}: no such file" in refusal(folder)


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / CONFIG).write_text("{")
    assert f"{CONFIG} is not that of a DiT: Invalid JSON" in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_classes": 0}, "diffusers has no unconditional DiT"),
        ({"mlp_ratio": 3.0}, "mlp_ratio 4, not 3"),
        ({"norm": "rms", "rope": True}, "does not have these options: norm, rope"),
    ],
)
@pytest.mark.parametrize("layout", ["diffusers", "pipeline"])
def test_what_diffusers_cannot_hold_is_refused(tmp_path: Path, fields: Any, reason: str, layout: Any) -> None:
    with pytest.raises(InputError, match=reason):
        write(pretrained(random_dit(**fields)), str(tmp_path / "theirs"), layout)
    assert not (tmp_path / "theirs").exists()
