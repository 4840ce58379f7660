"""Checkpoints in the layout of the published ones, and our own exported folders."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import tiny
import torch
from random_dit import pretrained, random_diffit, random_dit
from safetensors.torch import load_file, save_file

from dit.convert import read, write
from dit.diffusion.config import DiffusionConfig
from dit.export import EMA_WEIGHTS, ModelCard
from dit.models.config import DiffiTConfig, DiTConfig, dit_config
from dit.models.dit import DiT
from storage import uri
from storage.errors import InputError
from storage.latents import VaeInfo

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_dit()


@pytest.fixture
def weights(model: DiT) -> Weights:
    return model.state_dict()


def same(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def refusal(source: Path | str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(str(source), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_weights(tmp_path: Path, weights: Weights, heads: int | None = 4) -> str:
    save_file(weights, tmp_path / "spoilt.safetensors")
    message = refusal(tmp_path / "spoilt.safetensors", heads=heads)
    assert message.startswith(f"{tmp_path / 'spoilt.safetensors'}: ")
    return message.partition(": ")[2]


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_what_is_written_is_read(tmp_path: Path, model: DiT, weights: Weights, name: str) -> None:
    write(pretrained(model), str(tmp_path / name), "reference")
    found = read(str(tmp_path / name), heads=4)
    assert found.config == model.config
    assert same(found.state, weights)
    plain = torch.load(tmp_path / name, weights_only=True) if name == "x.pt" else load_file(tmp_path / name)
    assert same(plain, weights)


@pytest.mark.parametrize(
    "fields",
    [
        {"input_size": 12, "patch_size": 4, "in_channels": 3},
        {"mlp_ratio": 3.0, "learn_variance": False},
        {"num_classes": 0, "depth": 1},
    ],
)
def test_shapes_tell_the_config(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = random_dit(**fields)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    assert read(str(tmp_path / "x.safetensors"), heads=4).config == model.config


def test_the_published_training_checkpoint(tmp_path: Path, weights: Weights) -> None:
    raw = {name: tensor + 1 for name, tensor in weights.items() if name != "pos_embed"}
    whole = {
        "model": raw | {"pos_embed": weights["pos_embed"]},
        "ema": weights,
        "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-XL/2", num_classes=10),
    }
    torch.save(whole, tmp_path / "0400000.pt")
    assert same(read(str(tmp_path / "0400000.pt"), heads=4).state, weights)
    torch.save(whole | {"ema": None}, tmp_path / "no-ema.pt")
    assert same(read(str(tmp_path / "no-ema.pt"), heads=4).state, whole["model"])


@pytest.mark.parametrize("legacy", [False, True])
def test_bare_pickles(tmp_path: Path, weights: Weights, legacy: bool) -> None:
    torch.save(weights, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    assert same(read(str(tmp_path / "x.pth"), heads=4).state, weights)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_any_file_system_will_do(model: DiT, weights: Weights, suffix: str) -> None:
    url = f"memory://convert-test/x{suffix}"
    write(pretrained(model), url, "reference")
    assert same(read(url, heads=4).state, weights)
    fsspec.filesystem("memory").rm("/convert-test", recursive=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path: Path, weights: Weights, dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, tmp_path / "x.safetensors")
    found = read(str(tmp_path / "x.safetensors"), heads=4).state
    assert same(found, {name: tensor.to(dtype).float() for name, tensor in weights.items()})


def test_a_model_ready_to_sample(tmp_path: Path, model: DiT, weights: Weights) -> None:
    save_file(weights, tmp_path / "x.safetensors")
    before = torch.random.get_rng_state()
    found = read(str(tmp_path / "x.safetensors"), heads=4).build()
    assert torch.equal(torch.random.get_rng_state(), before)
    x, t, y = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 999]), [1, 10]
    assert torch.equal(found(x, t, torch.tensor(y)), model(x, t, torch.tensor(y)))
    assert found.config == model.config
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_published_widths_tell_the_heads(tmp_path: Path, weights: Weights) -> None:
    small = DiT(dit_config("S/8", depth=1))
    save_file(small.state_dict(), tmp_path / "s.safetensors")
    assert read(str(tmp_path / "s.safetensors")).config == small.config
    assert read(str(tmp_path / "s.safetensors"), heads=12).config.heads == 12
    assert refused_weights(tmp_path, weights, None).endswith("no published DiT has width 64; pass --heads")
    assert "not a multiple of heads 5" in refused_weights(tmp_path, weights, 5)
    assert "heads" in refused_weights(tmp_path, weights, 0)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_may_be_overwritten_once_it_is_read(tmp_path: Path, model: DiT, weights: Weights, name: str) -> None:
    """It is mapped while it is read: its pages would change under the weights, or be gone."""
    write(pretrained(model), str(tmp_path / name), "reference")
    found = read(str(tmp_path / name), heads=4)
    with (tmp_path / name).open("r+b") as file:
        file.write(bytes((tmp_path / name).stat().st_size))
    assert same(found.state, weights)


class Evil:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.place,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, weights: Weights) -> None:
    torch.save(weights | {"extra": Evil(tmp_path / "evil")}, tmp_path / "x.pt")
    assert "contains getattr, which is not loaded, as it could run code; if you trust the file, save" in refusal(
        tmp_path / "x.pt", heads=4
    )
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("data", [b"", b"no weights at all", b"PK\x03\x04 broken"])
def test_broken_files(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert str(tmp_path / name) in refusal(tmp_path / name)


@pytest.mark.parametrize("found", [[1], {"ema": {"step": 3}}, {"weights": {}}, {1: torch.zeros(1)}])
def test_pickles_of_other_things(tmp_path: Path, found: Any) -> None:
    torch.save(found, tmp_path / "x.pt")
    assert "contains no tensors by name, nor any under 'ema', 'model' or 'state_dict'; name" in refusal(
        tmp_path / "x.pt"
    )


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x.pt") == f"{tmp_path}/x.pt: no such file"
    assert refusal(tmp_path / "x.safetensors") == f"{tmp_path}/x.safetensors: no such file"
    assert "memory://none/x.pt: no such object" in refusal("memory://none/x.pt")
    assert "not a checkpoint; name a .pt" in refusal(tmp_path)
    assert "not a checkpoint; name a .pt" in refusal(tmp_path / "none")
    assert "nosuch://none: not a usable URL" in refusal("nosuch://none")
    assert "http://127.0.0.1:1/none: cannot be listed" in refusal("http://127.0.0.1:1/none")
    assert "http://127.0.0.1:1/x.pt: cannot be read" in refusal("http://127.0.0.1:1/x.pt")


@pytest.mark.parametrize("name", ["final_layer.linear.weight", "blocks.1.attn.qkv.bias", "t_embedder.mlp.0.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, weights: Weights, name: str) -> None:
    del weights[name]
    assert refused_weights(tmp_path, weights).startswith(f"no tensor {name}; only an adaLN-Zero DiT or a latent DiffiT")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.2.attn.proj.weight", (64, 63)),
        ("pos_embed", (1, 65, 64)),
        ("pos_embed", (64, 64)),
        ("x_embedder.proj.weight", (0, 4, 2, 2)),
        ("x_embedder.proj.weight", (64, 4, 2, 1)),
        ("final_layer.linear.weight", (48, 64)),
        ("final_layer.linear.bias", (16,)),
    ],
)
def test_a_wrong_shape_is_named(tmp_path: Path, weights: Weights, name: str, shape: tuple[int, ...]) -> None:
    message = refused_weights(tmp_path, weights | {name: torch.zeros(shape)})
    assert message.startswith(name)
    assert str(shape) in message


def test_integers_are_no_weights(tmp_path: Path, weights: Weights) -> None:
    name = "blocks.0.attn.proj.weight"
    assert f"{name} is torch.int8" in refused_weights(tmp_path, weights | {name: weights[name].to(torch.int8)})


def test_an_unknown_tensor_is_named(tmp_path: Path, weights: Weights) -> None:
    assert "unknown tensor blocks.1.norm.weight" in refused_weights(
        tmp_path, weights | {"blocks.1.norm.weight": torch.ones(64)}
    )


@pytest.mark.parametrize("block", ["adaln", "in_context", "cross_attention"])
def test_other_blocks_are_refused(tmp_path: Path, block: str) -> None:
    other = random_dit(block=block).state_dict()
    assert refused_weights(tmp_path, other).endswith(
        "only an adaLN-Zero DiT or a latent DiffiT with TMSA has this layout"
    )


def test_a_learned_position_table_is_refused(tmp_path: Path, weights: Weights) -> None:
    table = weights["pos_embed"] + 1e-4
    assert "off the fixed sin-cos table" in refused_weights(tmp_path, weights | {"pos_embed": table})
    save_file(weights | {"pos_embed": weights["pos_embed"] + 1e-6}, tmp_path / "x.safetensors")
    read(str(tmp_path / "x.safetensors"), heads=4)


def exported(folder: Path, config: DiTConfig | DiffiTConfig, weights: Weights) -> ModelCard:
    folder.mkdir()
    save_file(weights, folder / EMA_WEIGHTS)
    card = ModelCard(
        model=config,
        diffusion=DiffusionConfig(beta_end=0.03),
        vae=VaeInfo(source="none", sha256="0", downsample=4, channels=4, scaling_factor=0.5, shift_factor=0.25),
        resolution=64,
        class_names=tuple("0123456789"),
        steps=1,
        weights={EMA_WEIGHTS: uri.file_sha256(str(folder / EMA_WEIGHTS))},
    )
    tiny.commit_model(folder, card)
    return card


def test_our_own_trained_model(tmp_path: Path, model: DiT, weights: Weights) -> None:
    card = exported(tmp_path / "ours", model.config, weights)
    found = read(str(tmp_path / "ours"))
    assert (found.config, found.diffusion, found.scales) == (model.config, card.diffusion, card.vae)
    assert same(found.state, weights)
    assert "has heads 4, not 8; remove --heads" in refusal(tmp_path / "ours", heads=8)


def test_our_own_models_with_other_norms_and_mlps_have_lightningdits_names(tmp_path: Path) -> None:
    model = random_dit(norm="rms", rope=True)
    exported(tmp_path / "ours", model.config, model.state_dict())
    write(read(str(tmp_path / "ours")), str(tmp_path / "x.safetensors"), "reference")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() - model.state_dict().keys() == {"feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    assert same(model.state_dict(), {name: found[name] for name in model.state_dict()})


def test_our_own_diffit_has_the_names_of_the_published_one(tmp_path: Path) -> None:
    model = random_diffit()
    exported(tmp_path / "ours", model.config, model.state_dict())
    found = read(str(tmp_path / "ours"))
    assert (found.config, found.diffusion) == (model.config, DiffusionConfig(beta_end=0.03))
    write(found, str(tmp_path / "x.safetensors"), "reference")
    assert same(read(str(tmp_path / "x.safetensors")).state, model.state_dict())


def test_our_own_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    other = random_dit(block="adaln")
    exported(tmp_path / "ours", other.config, other.state_dict())
    assert "only an adaLN-Zero DiT or a latent DiffiT with TMSA has this layout" in refusal(tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours")


@pytest.mark.parametrize("condition", ["mlp", "token"])
def test_our_own_diffits_without_tmsa_are_refused(tmp_path: Path, condition: str) -> None:
    other = random_diffit(condition=condition)
    exported(tmp_path / "ours", other.config, other.state_dict())
    assert refusal(tmp_path / "ours").endswith("a latent DiffiT with TMSA has this layout")
    assert refused_weights(tmp_path, other.state_dict()).endswith("a latent DiffiT with TMSA has this layout")


def test_destinations_that_are_refused(tmp_path: Path, model: DiT) -> None:
    (tmp_path / "x.pt").write_bytes(b"mine")
    for name, reason in (("x.pt", "exists already"), ("x.bin", "ends in .safetensors or .pt")):
        with pytest.raises(InputError, match=reason):
            write(pretrained(model), str(tmp_path / name), "reference")
    with pytest.raises(InputError, match="only a pipeline has an autoencoder"):
        write(pretrained(model), str(tmp_path / "y.pt"), "reference", vae="anything")
    assert (tmp_path / "x.pt").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
