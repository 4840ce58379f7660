"""Latent DiffiT in the layout of its published files, against names, shapes and the index that are written out here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from other_checkpoints import Weights, refusal, same, saved
from random_dit import pretrained, random_diffit
from safetensors.torch import load_file

from dit.convert import described, read, write
from dit.convert.layout import published, tables
from dit.diffusion.config import DiffusionConfig
from dit.models.build import build
from dit.models.config import diffit_config
from dit.models.diffit_latent import LatentDiffiT
from storage.errors import InputError

INDEX = "blocks.1.attn.relative_position_index"


@pytest.fixture(scope="module")
def model() -> LatentDiffiT:
    return random_diffit()


@pytest.fixture
def file(tmp_path: Path, model: LatentDiffiT) -> Path:
    write(pretrained(model), str(tmp_path / "diffit_256.safetensors"), "reference")
    return tmp_path / "diffit_256.safetensors"


def published_shapes(window: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published files: 16 tokens along a side at 256 pixels, 32 at 512."""
    d, n = 1152, window**2
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, n, d), "y_embedder.embedding_table.weight": (1001, d)}
    linears = {"x_embedder.proj": (d, 4, 2, 2), "t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d)}
    linears |= {"final_layer.linear": (32, d)}
    for i in range(28):
        linears[f"blocks.{i}.attn.qkv"], linears[f"blocks.{i}.attn.qkv_temb"] = (3 * d, d), (3 * d, d)
        linears[f"blocks.{i}.attn.proj"] = (d, d)
        linears[f"blocks.{i}.mlp.fc1"], linears[f"blocks.{i}.mlp.fc2"] = (4 * d, d), (d, 4 * d)
        shapes[f"blocks.{i}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, 16)
        shapes[f"blocks.{i}.attn.relative_position_index"] = (n, n)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize(("latent", "window"), [(32, 16), (64, 32)])
def test_names_and_shapes_are_the_published_ones(latent: int, window: int) -> None:
    config = diffit_config("XL/2", input_size=latent)
    with torch.device("meta"):
        weights = build(config).state_dict()
    found = {published(name): tuple(tensor.shape) for name, tensor in weights.items()}
    found |= {name: tuple(table.shape) for name, table in tables(config).items()}
    assert found == published_shapes(window)
    trained = sum(tensor.numel() for name, tensor in weights.items() if name != "pos_embed")
    assert trained == 561_035_232 or window != 16


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_there_and_back_is_the_same_to_the_bit(tmp_path: Path, model: LatentDiffiT, name: str) -> None:
    write(pretrained(model), str(tmp_path / name), "reference")
    found = read(str(tmp_path / name))
    assert found.config == model.config
    assert found.diffusion == DiffusionConfig()
    assert same(found.state, model.state_dict())
    write(found, str(tmp_path / "again.safetensors"), "reference")
    first = torch.load(tmp_path / name, weights_only=True) if name == "x.pt" else load_file(tmp_path / name)
    assert same(first, load_file(tmp_path / "again.safetensors"))


def test_the_index_is_query_minus_key(file: Path) -> None:
    window = 8
    index = load_file(file)[INDEX]
    for query, key in ((0, 0), (0, 1), (1, 0), (63, 0), (0, 63), (17, 42)):
        dy, dx = query // window - key // window, query % window - key % window
        assert index[query, key] == (dy + window - 1) * (2 * window - 1) + dx + window - 1


@torch.no_grad()
def test_a_block_of_the_file_is_the_formula(file: Path, model: LatentDiffiT) -> None:
    """The file's attention with its own bias and index, as another implementation would compute it."""
    tensors, x, c = load_file(file), torch.randn(2, 64, 64), torch.randn(2, 64)

    def linear(name: str, of: torch.Tensor) -> torch.Tensor:
        return of @ tensors[f"blocks.1.attn.{name}.weight"].T + tensors[f"blocks.1.attn.{name}.bias"]

    q, k, v = (linear("qkv", x) + linear("qkv_temb", c)[:, None]).reshape(2, 64, 3, 4, 16).permute(2, 0, 3, 1, 4)
    bias = tensors["blocks.1.attn.relative_position_bias_table"][tensors[INDEX].flatten()].reshape(64, 64, 4)
    attended = ((q @ k.transpose(2, 3)) / 4 + bias.permute(2, 0, 1)).softmax(-1) @ v
    expected = linear("proj", attended.transpose(1, 2).reshape(2, 64, 64))
    found = read(str(file)).build().get_submodule("blocks.1.attn")(x, c)
    torch.testing.assert_close(found, expected)


def test_the_model_computes_what_it_did(file: Path, model: LatentDiffiT) -> None:
    x, t, y = torch.randn(2, 4, 16, 16), torch.tensor([3, 999]), torch.tensor([1, 10])
    assert torch.equal(read(str(file)).build()(x, t, y), model(x, t, y))


def test_what_was_read_and_assumed_is_said(tmp_path: Path, file: Path) -> None:
    published = saved(tmp_path, load_file(file))
    first, assumed = described(read(published))
    assert first.startswith("DiffiT of depth 3, width 64, 4 heads, patches of 2, latents 4x16x16, 10 classes")
    assert assumed == (
        "assumed: it predicts noise of 1000 linear steps, as the published DiffiT. --process gaussian confirms"
    )
    assert len(described(read(published, process="gaussian"))) == 1
    assert len(described(read(str(file)))) == 1  # what we write records its process


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "ema"])
def test_wrapped_weights(tmp_path: Path, model: LatentDiffiT, file: Path, prefix: str, key: str | None) -> None:
    wrapped = {prefix + name: tensor for name, tensor in load_file(file).items()}
    whole = {key: wrapped, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}} if key else wrapped
    assert same(read(saved(tmp_path, whole)).state, model.state_dict())


def test_tables_may_be_missing(tmp_path: Path, model: LatentDiffiT, file: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith("index")}
    assert same(read(saved(tmp_path, tensors)).state, model.state_dict())
    del tensors["pos_embed"]
    assert "pass --latent-size" in refusal(saved(tmp_path, tensors))
    assert same(read(saved(tmp_path, tensors), latent_size=16).state, model.state_dict())


def transposed(index: torch.Tensor) -> torch.Tensor:
    """As key minus query would be."""
    return index.T.contiguous()


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (INDEX, transposed, f"{INDEX} is 2.2e+02 off the fixed table of this layout"),
        (INDEX, lambda index: index[1:], f"{INDEX} has shape (63, 64), not (64, 64)"),
        (INDEX, lambda index: index.to("meta"), f"{INDEX} is sparse, a part of a tensor, or without values"),
        ("pos_embed", lambda table: table + 1, "pos_embed is 1 off the fixed sin-cos table"),
        (
            "blocks.2.attn.relative_position_bias_table",
            lambda table: table[:-1],
            "blocks.2.attn.relative_position_bias_table is torch.float32 (224, 4), not floats (225, 4)",
        ),
        ("blocks.0.attn.qkv_temb.weight", lambda weight: weight * torch.nan, "qkv_temb.weight is not finite"),
        ("blocks.0.attn.qkv_temb.bias", None, "no tensor blocks.0.attn.qkv_temb.bias"),
        ("blocks.1.attn.relative_position_bias_table", None, "no tensor blocks.1.attn.relative_position_bias_table"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, file: Path, name: str, change: Any, reason: str) -> None:
    tensors = load_file(file)
    tensor = tensors.pop(name)
    message = refusal(saved(tmp_path, tensors if change is None else tensors | {name: change(tensor)}))
    assert message.startswith(f"{tmp_path}/x.pt: ")
    assert reason in message


def test_tensors_of_another_network_are_named(tmp_path: Path, file: Path) -> None:
    extra: Weights = load_file(file) | {"blocks.0.adaLN_modulation.1.weight": torch.ones(384, 64)}
    assert "unknown tensor blocks.0.adaLN_modulation.1.weight; only" in refusal(saved(tmp_path, extra))


@pytest.mark.parametrize("layout", ["diffusers", "pipeline"])
def test_diffusers_has_none(tmp_path: Path, model: LatentDiffiT, layout: Any) -> None:
    with pytest.raises(InputError, match="diffusers has no DiffiT; use --to reference"):
        write(pretrained(model), str(tmp_path / "theirs"), layout)
    assert not (tmp_path / "theirs").exists()
