"""Inception-v3 for FID. With DITFLOW_INCEPTION set to the published weights, they are checked too; with
DITFLOW_ADM_REFERENCE and DITFLOW_ADM_SAMPLES set to ADM's npz files for ImageNet 256, so are its numbers."""

import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dit.metrics.extractors.inception import WEIGHTS, InceptionTF, InceptionV3, load_inception
from dit.metrics.extractors.load import ExtractorRef, load_extractor
from dit.metrics.extractors.resize import resize_tf1
from dit.metrics.frechet import Statistics
from dit.metrics.summary import Names, Summary, compare
from storage import uri
from storage.errors import InputError

State = dict[str, torch.Tensor]

STEM = {"Conv2d_1a_3x3": "3 32 3", "Conv2d_2a_3x3": "32 32 3", "Conv2d_2b_3x3": "32 64 3"}
STEM |= {"Conv2d_3b_1x1": "64 80 1", "Conv2d_4a_3x3": "80 192 3"}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every convolution of the network by its name in PyTorch: (out, in, rows, columns)."""
    lines = dict(STEM)
    for block, width, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        lines |= {
            f"Mixed_{block}.branch1x1": f"{width} 64 1",
            f"Mixed_{block}.branch5x5_1": f"{width} 48 1",
            f"Mixed_{block}.branch5x5_2": "48 64 5",
            f"Mixed_{block}.branch3x3dbl_1": f"{width} 64 1",
            f"Mixed_{block}.branch3x3dbl_2": "64 96 3",
            f"Mixed_{block}.branch3x3dbl_3": "96 96 3",
            f"Mixed_{block}.branch_pool": f"{width} {pooled} 1",
        }
    lines |= {
        "Mixed_6a.branch3x3": "288 384 3",
        "Mixed_6a.branch3x3dbl_1": "288 64 1",
        "Mixed_6a.branch3x3dbl_2": "64 96 3",
        "Mixed_6a.branch3x3dbl_3": "96 96 3",
    }
    for block, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        lines |= {
            f"Mixed_{block}.branch1x1": "768 192 1",
            f"Mixed_{block}.branch7x7_1": f"768 {width} 1",
            f"Mixed_{block}.branch7x7_2": f"{width} {width} 1x7",
            f"Mixed_{block}.branch7x7_3": f"{width} 192 7x1",
            f"Mixed_{block}.branch7x7dbl_1": f"768 {width} 1",
            f"Mixed_{block}.branch7x7dbl_2": f"{width} {width} 7x1",
            f"Mixed_{block}.branch7x7dbl_3": f"{width} {width} 1x7",
            f"Mixed_{block}.branch7x7dbl_4": f"{width} {width} 7x1",
            f"Mixed_{block}.branch7x7dbl_5": f"{width} 192 1x7",
            f"Mixed_{block}.branch_pool": "768 192 1",
        }
    lines |= {
        "Mixed_7a.branch3x3_1": "768 192 1",
        "Mixed_7a.branch3x3_2": "192 320 3",
        "Mixed_7a.branch7x7x3_1": "768 192 1",
        "Mixed_7a.branch7x7x3_2": "192 192 1x7",
        "Mixed_7a.branch7x7x3_3": "192 192 7x1",
        "Mixed_7a.branch7x7x3_4": "192 192 3",
    }
    for block, width in (("7b", 1280), ("7c", 2048)):
        lines |= {
            f"Mixed_{block}.branch1x1": f"{width} 320 1",
            f"Mixed_{block}.branch3x3_1": f"{width} 384 1",
            f"Mixed_{block}.branch3x3_2a": "384 384 1x3",
            f"Mixed_{block}.branch3x3_2b": "384 384 3x1",
            f"Mixed_{block}.branch3x3dbl_1": f"{width} 448 1",
            f"Mixed_{block}.branch3x3dbl_2": "448 384 3",
            f"Mixed_{block}.branch3x3dbl_3a": "384 384 1x3",
            f"Mixed_{block}.branch3x3dbl_3b": "384 384 3x1",
            f"Mixed_{block}.branch_pool": f"{width} 192 1",
        }
    found = {}
    for name, line in lines.items():
        width_in, width, kernel = line.split()
        rows, _, columns = kernel.partition("x")
        found[name] = (int(width), int(width_in), int(rows), int(columns or rows))
    return found


@pytest.fixture(scope="module")
def state() -> State:
    """Weights, made without the network, that neither explode nor vanish."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights: State = {}
    for name, (width, *rest) in shapes().items():
        weights[f"{name}.conv.weight"] = noise(width, *rest) * (2 / np.prod(rest)) ** 0.5
        weights |= {f"{name}.bn.weight": 1 + 0.1 * noise(width), f"{name}.bn.bias": 0.1 * noise(width)}
        weights |= {f"{name}.bn.running_mean": 0.1 * noise(width), f"{name}.bn.running_var": 1 + noise(width) ** 2 / 9}
    return weights | {"fc.weight": 0.1 * noise(1008, 2048), "fc.bias": 5 + noise(1008)}


@pytest.fixture(scope="module")
def file(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / WEIGHTS
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def extractor(file: Path) -> InceptionTF:
    return load_inception(str(file))


def pictures(count: int = 2, height: int = 40, width: int = 56) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def conv(state: State, name: str, x: torch.Tensor, stride: int = 1, padding: int | tuple[int, int] = 0) -> torch.Tensor:
    x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding)
    mean, var = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
    scale = state[f"{name}.bn.weight"] / (var + 0.001).sqrt()
    shift = state[f"{name}.bn.bias"] - mean * scale
    return (x * scale[:, None, None] + shift[:, None, None]).clamp(min=0)


def average(x: torch.Tensor) -> torch.Tensor:
    """3x3, over what lies within the picture."""
    ones = torch.ones(x.shape[1], 1, 3, 3)
    inside = F.conv2d(torch.ones_like(x), ones, padding=1, groups=x.shape[1])
    return F.conv2d(x, ones, padding=1, groups=x.shape[1]) / inside


def block(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    """One block written out."""

    def c(part: str, x: torch.Tensor, padding: int | tuple[int, int] = 0, stride: int = 1) -> torch.Tensor:
        return conv(state, f"{name}.{part}", x, stride, padding)

    across, down = (0, 3), (3, 0)
    if name == "Mixed_5c":
        double = c("branch3x3dbl_3", c("branch3x3dbl_2", c("branch3x3dbl_1", x), 1), 1)
        five = c("branch5x5_2", c("branch5x5_1", x), 2)
        return torch.cat([c("branch1x1", x), five, double, c("branch_pool", average(x))], 1)
    if name == "Mixed_6a":
        double = c("branch3x3dbl_3", c("branch3x3dbl_2", c("branch3x3dbl_1", x), 1), stride=2)
        return torch.cat([c("branch3x3", x, stride=2), double, F.max_pool2d(x, 3, 2)], 1)
    if name == "Mixed_6d":
        single = c("branch7x7_3", c("branch7x7_2", c("branch7x7_1", x), across), down)
        double = c("branch7x7dbl_2", c("branch7x7dbl_1", x), down)
        double = c("branch7x7dbl_4", c("branch7x7dbl_3", double, across), down)
        double = c("branch7x7dbl_5", double, across)
        return torch.cat([c("branch1x1", x), single, double, c("branch_pool", average(x))], 1)
    if name == "Mixed_7a":
        three = c("branch3x3_2", c("branch3x3_1", x), stride=2)
        seven = c("branch7x7x3_3", c("branch7x7x3_2", c("branch7x7x3_1", x), across), down)
        return torch.cat([three, c("branch7x7x3_4", seven, stride=2), F.max_pool2d(x, 3, 2)], 1)
    single, double = c("branch3x3_1", x), c("branch3x3dbl_2", c("branch3x3dbl_1", x), 1)
    forks = [
        c(f"{part}{side}", y, (0, 1) if side == "a" else (1, 0))
        for part, y in (("branch3x3_2", single), ("branch3x3dbl_3", double))
        for side in "ab"
    ]
    pooled = average(x) if name == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
    return torch.cat([c("branch1x1", x), *forks, c("branch_pool", pooled)], 1)


def test_names_and_shapes_are_those_of_the_shared_port(state: State) -> None:
    network = InceptionV3()
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    counters = {name: shape for name, shape in found.items() if name.endswith(".num_batches_tracked")}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} | counters == found
    assert len(counters) == 94
    assert sum(p.numel() for p in network.parameters()) == 27_161_264 - 3_326_696 + 8 * 2049  # no aux head, 8 classes
    assert sum(layer.num_features for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)) == 17_216


BLOCKS = [("Mixed_5c", 256, 6), ("Mixed_6a", 288, 7), ("Mixed_6d", 768, 5)]
BLOCKS += [("Mixed_7a", 768, 7), ("Mixed_7b", 1280, 4), ("Mixed_7c", 2048, 4)]


@pytest.mark.parametrize(("name", "width", "side"), BLOCKS)
@torch.no_grad()
def test_blocks_are_what_is_written_out(extractor: InceptionTF, state: State, name: str, width: int, side: int) -> None:
    x = torch.randn(1, width, side, side, generator=torch.Generator().manual_seed(1))
    found = extractor.network.get_submodule(name)(x.clone())
    torch.testing.assert_close(found, block(state, name, x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_average_pools_leave_the_padding_out(extractor: InceptionTF) -> None:
    pools = {name: getattr(layer, "pool", None) for name, layer in extractor.network.named_children()}
    averaged = [name for name, pool in pools.items() if isinstance(pool, torch.nn.AvgPool2d)]
    assert averaged == [f"Mixed_{block}" for block in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b")]
    for name in averaged:
        assert torch.equal(pools[name](torch.ones(1, 1, 3, 3)), torch.ones(1, 1, 3, 3))


@torch.no_grad()
def test_three_layers_of_output(extractor: InceptionTF, state: State) -> None:
    """The path through the network, with blocks tested above."""
    outputs = extractor.outputs(pictures())
    x = (resize_tf1(torch.from_numpy(pictures()).permute(0, 3, 1, 2).float(), 299) - 128) / 128
    x = conv(state, "Conv2d_1a_3x3", x, 2)
    x = conv(state, "Conv2d_2b_3x3", conv(state, "Conv2d_2a_3x3", x), padding=1)
    x = F.max_pool2d(x, 3, 2)
    x = conv(state, "Conv2d_4a_3x3", conv(state, "Conv2d_3b_1x1", x))
    x = F.max_pool2d(x, 3, 2)
    sides = [x.shape[2]]
    for part in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
        if part == "6d":
            spatial = conv(state, "Mixed_6d.branch1x1", x)[:, :7].numpy()
        x = extractor.network.get_submodule(f"Mixed_{part}")(x)
        sides.append(x.shape[2])
    assert sides == [35] * 4 + [17] * 5 + [8] * 3
    pooled = x.mean((2, 3))
    assert pooled.std() > 0.1
    torch.testing.assert_close(outputs.features, pooled, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(outputs.logits, pooled @ state["fc.weight"].T, rtol=1e-3, atol=1e-3)
    assert outputs.spatial is not None
    assert outputs.spatial.shape == (2, 2023)
    np.testing.assert_allclose(outputs.spatial.numpy(), spatial.transpose(0, 2, 3, 1).reshape(2, -1), 1e-3, 1e-3)
    assert not np.allclose(outputs.spatial.numpy(), spatial.reshape(2, -1), 1e-3, 1e-3)


def test_extractor_says_what_it_is(extractor: InceptionTF, file: Path) -> None:
    assert (extractor.name, extractor.version, extractor.dims) == ("inception-tf", 1, 2048)
    assert extractor.sha256 == uri.sha256(file.read_bytes())
    assert not extractor.published
    assert InceptionTF(extractor.network, "6726825d" + 56 * "0").published
    assert ExtractorRef(name="inception-tf", weights=str(file)).identity() == {"name": "inception-tf"}
    parameter = extractor.network.get_parameter("Mixed_7c.branch3x3_2a.conv.weight")
    assert parameter.is_contiguous(memory_format=torch.channels_last)
    assert not parameter.requires_grad


def test_folder_file_and_safetensors_are_one(state: State, file: Path, extractor: InceptionTF, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors.torch.save(state))
    for place in (file.parent, tmp_path / "model.safetensors"):
        found = load_extractor(ExtractorRef(name="inception-tf", weights=str(place)))
        assert isinstance(found, InceptionTF)
        assert torch.equal(found.network.fc.weight, extractor.network.fc.weight)


def test_missing_weights_are_described_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}/{WEIGHTS}: no such object.*evaluate.extractor.weights") as caught:
        load_extractor(ExtractorRef(name="inception-tf", weights=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_altered_weights_are_caught_by_the_hash(file: Path) -> None:
    with pytest.raises(InputError, match=f"its sha256 is .*, not the expected {64 * '0'}"):
        load_inception(str(file), 64 * "0")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("content", ["text", "code", "list", "other"])
def test_broken_weights_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_bytes(b"not weights at all")
    else:
        torch.save({"code": Evil(), "list": [1], "other": {"fc.weight": torch.zeros(1)}}[content], path)
    with pytest.raises(InputError, match="weights.pth: not the weights of Inception") as caught:
        load_inception(str(path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("images", [pictures().astype(np.float32), pictures()[0], pictures().transpose(0, 3, 1, 2)])
def test_other_images_are_refused(extractor: InceptionTF, images: NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match="inception-tf: needs uint8 images"):
        extractor(images)


@pytest.mark.skipif("DITFLOW_INCEPTION" not in os.environ, reason="DITFLOW_INCEPTION does not name the weights")
def test_published_weights_fit() -> None:
    published = load_inception(os.environ["DITFLOW_INCEPTION"])
    assert published.published
    assert 0.1 < float(published(pictures(4, 64, 64)).mean()) < 1


@pytest.mark.skipif(
    not {"DITFLOW_INCEPTION", "DITFLOW_ADM_REFERENCE", "DITFLOW_ADM_SAMPLES"} <= set(os.environ),
    reason="DITFLOW_INCEPTION, DITFLOW_ADM_REFERENCE and DITFLOW_ADM_SAMPLES do not name the files",
)
def test_numbers_of_adm_u_at_256_pixels() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    published = load_inception(os.environ["DITFLOW_INCEPTION"], device=device)
    sets = []
    for variable in ("DITFLOW_ADM_REFERENCE", "DITFLOW_ADM_SAMPLES"):
        images = np.load(os.environ[variable])["arr_0"]
        sets.append(Summary(published.dims))
        for start in range(0, len(images), 64):
            batch = images[start : start + 64]
            sets[-1].update(published.outputs(batch), len(images))
    reference, samples = sets
    with np.load(os.environ["DITFLOW_ADM_REFERENCE"]) as given:  # of all training images, where arr_0 has 10,000
        mean, s, mean_s, s_s = (torch.from_numpy(given[key]).double() for key in ("mu", "sigma", "mu_s", "sigma_s"))
    reference.statistics, reference.spatial = Statistics(2, mean, s), Statistics(2, mean_s, s_s)
    found = compare(reference, samples, Names(published=True), ("adm-fp16",))
    assert found["fid"] == pytest.approx(3.9426, abs=0.005)
    assert found["sfid"] == pytest.approx(6.140, abs=0.005)
    assert found["inception_score"] == pytest.approx(215.84, abs=0.3)
    assert found["precision_adm_fp16"] == pytest.approx(0.8265, abs=0.0005)
    assert found["recall_adm_fp16"] == pytest.approx(0.5309, abs=0.0005)
