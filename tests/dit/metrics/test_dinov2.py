"""DINOv2 with random weights against the formulae, written out from the names in the file."""

import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from dit.metrics.extractors.base import FeatureExtractor
from dit.metrics.extractors.dinov2 import WEIGHTS, VisionTransformer, load_dinov2
from dit.metrics.extractors.load import ExtractorRef, load_extractor
from dit.metrics.extractors.resize import resize_bicubic
from storage import uri
from storage.errors import InputError

WIDTH, DEPTH = 128, 2
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Weights of a size of our own, in the published names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in VisionTransformer(WIDTH, DEPTH).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, state: State) -> Path:
    path = tmp_path_factory.mktemp("dinov2") / WEIGHTS
    torch.save(state, path)
    return path


def pictures(side: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75, which torch interpolates with."""
    x = abs(x)
    if x < 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def positions(state: State) -> np.ndarray:
    """From 37 x 37 to 16 x 16, where the factor is that of 16.1."""
    matrix = np.zeros((16, 37))
    for row in range(16):
        centre = (row + 0.5) * 37 / 16.1 - 0.5
        for near in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(near, 0), 36)] += cubic(centre - near)
    grid = state["pos_embed"][0, 1:].double().numpy().reshape(37, 37, WIDTH)
    return np.einsum("ry,cx,yxd->rcd", matrix, matrix, grid).reshape(256, WIDTH)


def norm(x: np.ndarray, state: State, name: str) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    weight, bias = (state[f"{name}.{part}"].numpy() for part in ("weight", "bias"))
    return (x - mean) / np.sqrt(variance + 1e-6) * weight + bias


def linear(x: np.ndarray, state: State, name: str) -> np.ndarray:
    return x @ state[f"{name}.weight"].double().numpy().T + state[f"{name}.bias"].double().numpy()


def attention(x: np.ndarray, state: State, name: str) -> np.ndarray:
    q, k, v = np.split(linear(x, state, f"{name}.qkv"), 3, axis=1)
    heads = []
    for at in range(0, WIDTH, 64):
        own = slice(at, at + 64)
        weights = np.exp(q[:, own] @ k[:, own].T / 8)
        heads.append(weights / weights.sum(1, keepdims=True) @ v[:, own])
    return linear(np.concatenate(heads, 1), state, f"{name}.proj")


def by_hand(state: State, image: np.ndarray) -> np.ndarray:
    """The features of one image, in float64."""
    large = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
    pixels = (large / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    squares = pixels.reshape(16, 14, 16, 14, 3).transpose(0, 2, 4, 1, 3).reshape(256, -1)
    kernel = state["patch_embed.proj.weight"].double().numpy().reshape(WIDTH, -1)
    patches = squares @ kernel.T + state["patch_embed.proj.bias"].double().numpy() + positions(state)
    x = np.concatenate([(state["cls_token"] + state["pos_embed"][:, :1])[0].double().numpy(), patches])
    for number in range(DEPTH):
        block = f"blocks.{number}"
        x = (
            x
            + attention(norm(x, state, f"{block}.norm1"), state, f"{block}.attn") * state[f"{block}.ls1.gamma"].numpy()
        )
        hidden = linear(norm(x, state, f"{block}.norm2"), state, f"{block}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(torch.from_numpy(hidden) / 2**0.5).numpy()) / 2
        x = x + linear(hidden, state, f"{block}.mlp.fc2") * state[f"{block}.ls2.gamma"].numpy()
    return norm(x[0], state, "norm")


@pytest.mark.parametrize("side", [60, 224, 300])
def test_features_are_those_of_the_formulae(weights: Path, state: State, side: int) -> None:
    found = load_dinov2(str(weights))(pictures(side))
    expected = np.stack([by_hand(state, image) for image in pictures(side)])
    assert (found.dtype, found.shape) == (torch.float32, (3, WIDTH))
    error = np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected)
    assert error < (1e-5 if side == 224 else 1e-3)  # elsewhere a level of a pixel may differ


@pytest.mark.parametrize("side", [32, 256, 500])
def test_resizing_is_pillows(side: int) -> None:
    images = pictures(side)
    found = resize_bicubic(torch.from_numpy(images).permute(0, 3, 1, 2).float(), 224).permute(0, 2, 3, 1).numpy()
    pillow = [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in images]
    apart = np.abs(found - np.stack(pillow))
    assert apart.max() <= 1
    assert apart.mean() < 0.01


def test_the_published_size() -> None:
    with torch.device("meta"):
        network = VisionTransformer(1024, 24)
    assert sum(parameter.numel() for parameter in network.parameters()) == 304_368_640
    assert len(network.state_dict()) == 4 + 3 + 24 * 14
    assert network.pos_embed.shape == (1, 1370, 1024)


def test_folder_file_and_safetensors_are_one(tmp_path: Path, weights: Path, state: State) -> None:
    (tmp_path / "half.safetensors").write_bytes(safetensors.torch.save({k: v.half() for k, v in state.items()}))
    extractor: FeatureExtractor = load_extractor(ExtractorRef(name="dinov2", weights=str(weights.parent)))
    assert extractor.sha256 == uri.sha256(weights.read_bytes())
    assert (extractor.name, extractor.version, extractor.dims, extractor.published) == ("dinov2", 1, WIDTH, False)
    assert extractor.preprocessing == "pillow-bicubic-224/imagenet"
    outputs = extractor.outputs(pictures())
    assert outputs.logits is None
    assert outputs.spatial is None
    half = load_dinov2(str(tmp_path / "half.safetensors"))
    torch.testing.assert_close(half(pictures()), outputs.features, rtol=0.05, atol=0.05)


def test_absent_weights_are_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}/{WEIGHTS}: no such object.*dinov2 reads {WEIGHTS}") as caught:
        load_dinov2(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["text", "other names", "with registers"])
def test_other_weights_are_refused_in_one_line(tmp_path: Path, state: State, kind: str) -> None:
    path = tmp_path / "a.pth"
    if kind == "text":
        path.write_bytes(b"not weights at all")
    elif kind == "other names":
        torch.save({"embeddings.cls_token": torch.zeros(1, 1, 64)}, path)
    else:
        torch.save(state | {"register_tokens": torch.zeros(1, 4, WIDTH)}, path)
    with pytest.raises(InputError, match="not the weights of DINOv2") as caught:
        load_dinov2(str(path))
    assert "\n" not in str(caught.value)


def test_other_images_are_refused(weights: Path) -> None:
    with pytest.raises(InputError, match=r"dinov2: needs uint8 images \(B, H, W, 3\)"):
        load_dinov2(str(weights))(np.zeros((1, 3, 8, 8), np.uint8))
