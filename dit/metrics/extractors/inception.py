"""Inception-v3 (Szegedy et al., arXiv 1512.00567) as in TensorFlow's graph of 2015-12-05, which FID is defined with.

Names and shapes of the weights are those of the PyTorch port that is widely shared. It differs from the
usual network in PyTorch: average pools leave the padding out, the last block has a max pool, and there
are 1008 classes.
"""

# B = batch, C = channels, H, W = image sides, h = side of a feature map

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from dit.devices import exact_float32
from dit.metrics.extractors.base import Images, Outputs, checked
from dit.metrics.extractors.resize import resize_tf1
from dit.weights import WeightsFile

WEIGHTS: Final = "weights-inception-2015-12-05-6726825d.pth"
PUBLISHED: Final = "6726825d"
"""First digits of the sha256 of the published weights."""
FILE: Final = WeightsFile(
    WEIGHTS,
    title="Inception",
    hint=f"inception-tf reads {WEIGHTS}, the shared PyTorch port of TensorFlow's Inception (its sha256 begins "
    f"{PUBLISHED}); point evaluate.extractor.weights at it, by path or URL",
)
SIDE: Final = 299
DIMS: Final = 2048
CLASSES: Final = 1008
SPATIAL_BLOCK: Final = "Mixed_6d"
SPATIAL_CHANNELS: Final = 7

Kernel = int | tuple[int, int]
Step = tuple[tuple[str, int, Kernel], ...]
"""Convolutions side by side on the same input: name, width and kernel of each."""
Chain = tuple[Step, ...]
"""One step after the other."""
Pool = Literal["average", "max"]


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. Inputs are padded to keep the side, unless ``valid`` or strided."""

    def __init__(self, width_in: int, width: int, kernel: Kernel, stride: int = 1, *, valid: bool = False) -> None:
        super().__init__()
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if valid or stride > 1 else (rows // 2, columns // 2)
        self.conv = nn.Conv2d(width_in, width, (rows, columns), stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, h) to (B, width, h, h), smaller if strided or valid."""
        out: Tensor = F.relu(self.bn(self.conv(x)), inplace=True)
        return out


class Mixed(nn.Module):
    """Chains of convolutions side by side, whose outputs are concatenated in order.

    Args:
        width_in: C.
        chains: the last one works on the pooled input; if it is empty, it is the pool itself.
        pool: kind of the 3x3 pool.
        stride: stride of the last convolution of every chain, and of the pool.
    """

    def __init__(self, width_in: int, chains: tuple[Chain, ...], pool: Pool, stride: int = 1) -> None:
        super().__init__()
        self.chains, self.width = chains, 0
        padding = 1 if stride == 1 else 0
        self.pool: nn.Module = nn.MaxPool2d(3, stride, padding)
        if pool == "average":
            self.pool = nn.AvgPool2d(3, stride, padding, count_include_pad=False)
        for chain in chains:
            width = width_in
            for step in chain:
                for name, width_out, kernel in step:
                    self.add_module(name, Conv(width, width_out, kernel, stride if step is chain[-1] else 1))
                width = sum(width_out for _, width_out, _ in step)
            self.width += width

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, h) to (B, width, h, h), half as high and wide if strided."""
        inputs = [x] * (len(self.chains) - 1) + [self.pool(x)]
        return torch.cat([self._follow(*pair) for pair in zip(self.chains, inputs, strict=True)], 1)

    def _follow(self, chain: Chain, x: Tensor) -> Tensor:
        for step in chain:
            x = torch.cat([self.get_submodule(name)(x) for name, _, _ in step], 1)
        return x


class InceptionV3(nn.Module):
    """The network from resized images on."""

    def __init__(self) -> None:
        super().__init__()
        for name, layer in _layers():
            self.add_module(name, layer)
        self.fc = nn.Linear(DIMS, CLASSES)

    def forward(self, images: Tensor) -> Outputs:
        """Outputs for images float32 (B, 3, 299, 299) in -1..1.

        Features are the pooled activations (``pool_3``). The spatial ones are the first 7 channels of
        ``Mixed_6d.branch1x1``, which are the block's first 7, with the channel as the fastest index.
        Logits leave the bias out.
        """
        x, spatial = images, images
        for name, layer in self.named_children():
            if layer is not self.fc:
                x = layer(x)
            if name == SPATIAL_BLOCK:
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        pooled = x.mean((2, 3))
        return Outputs(pooled, F.linear(pooled, self.fc.weight), spatial)


def fold_norms(network: nn.Module) -> None:
    """Fold every batch norm into its convolution: faster, and the same up to rounding. Call it after ``eval()``."""
    for layer in list(network.modules()):
        if isinstance(layer, Conv) and isinstance(layer.bn, nn.BatchNorm2d):
            layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()


def _layers() -> Iterator[tuple[str, nn.Module]]:
    yield "Conv2d_1a_3x3", Conv(3, 32, 3, 2)
    yield "Conv2d_2a_3x3", Conv(32, 32, 3, valid=True)
    yield "Conv2d_2b_3x3", Conv(32, 64, 3)
    yield "maxpool1", nn.MaxPool2d(3, 2)
    yield "Conv2d_3b_1x1", Conv(64, 80, 1)
    yield "Conv2d_4a_3x3", Conv(80, 192, 3, valid=True)
    yield "maxpool2", nn.MaxPool2d(3, 2)
    width = 192
    for name, chains, pool, stride in _blocks():
        block = Mixed(width, chains, pool, stride)
        width = block.width
        yield name, block


def _blocks() -> Iterator[tuple[str, tuple[Chain, ...], Pool, int]]:
    yield "Mixed_5b", _block_35(32), "average", 1
    yield "Mixed_5c", _block_35(64), "average", 1
    yield "Mixed_5d", _block_35(64), "average", 1
    yield "Mixed_6a", (_chain("branch3x3", (384, 3)), _double_3x3(96), ()), "max", 2
    for name, width in zip(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), (128, 160, 160, 192), strict=True):
        yield name, _block_17(width), "average", 1
    reduced = _chain("branch3x3_", (192, 1), (320, 3))
    yield "Mixed_7a", (reduced, _chain("branch7x7x3_", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)), ()), "max", 2
    yield "Mixed_7b", _block_8(), "average", 1
    yield "Mixed_7c", _block_8(), "max", 1


def _block_35(pooled: int) -> tuple[Chain, ...]:
    """The branches on 35x35."""
    return (
        _chain("branch1x1", (64, 1)),
        _chain("branch5x5_", (48, 1), (64, 5)),
        _double_3x3(96),
        _chain("branch_pool", (pooled, 1)),
    )


def _block_17(width: int) -> tuple[Chain, ...]:
    """The branches on 17x17."""
    across, down = (1, 7), (7, 1)
    double = ((width, 1), (width, down), (width, across), (width, down), (192, across))
    return (
        _chain("branch1x1", (192, 1)),
        _chain("branch7x7_", (width, 1), (width, across), (192, down)),
        _chain("branch7x7dbl_", *double),
        _chain("branch_pool", (192, 1)),
    )


def _block_8() -> tuple[Chain, ...]:
    """The branches on 8x8, two of which fork."""
    return (
        _chain("branch1x1", (320, 1)),
        (*_chain("branch3x3_1", (384, 1)), _fork("branch3x3_2")),
        (*_chain("branch3x3dbl_", (448, 1), (384, 3)), _fork("branch3x3dbl_3")),
        _chain("branch_pool", (192, 1)),
    )


def _double_3x3(width: int) -> Chain:
    return _chain("branch3x3dbl_", (64, 1), (width, 3), (width, 3))


def _fork(name: str) -> Step:
    return (f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))


def _chain(name: str, *convs: tuple[int, Kernel]) -> Chain:
    """Widths and kernels one after the other; a name that ends in an underscore is numbered from 1."""
    numbers = range(1, len(convs) + 1)
    names = [f"{name}{number}" if name.endswith("_") else name for number in numbers]
    return tuple(((each, width, kernel),) for each, (width, kernel) in zip(names, convs, strict=True))


@dataclass(frozen=True)
class InceptionTF:
    """The network as a `dit.metrics.extractors.base.FeatureExtractor`, in float32 without TF32, channels last."""

    network: InceptionV3
    sha256: str
    name: str = "inception-tf"
    version: int = 1
    dims: int = DIMS
    preprocessing: str = "tf1-bilinear-299/(x-128)/128"

    @property
    def published(self) -> bool:
        """Whether the weights are those that FID is defined with."""
        return self.sha256.startswith(PUBLISHED)

    def __call__(self, images: Images) -> Tensor:
        """Features float32 (B, 2048); images and errors as in `outputs`."""
        return self.outputs(images).features

    @torch.no_grad()
    def outputs(self, images: Images) -> Outputs:
        """Features (B, 2048), logits (B, 1008) and spatial features (B, 2023), of images uint8 (B, H, W, 3).

        Raises:
            InputError: the images have another type or shape.
        """
        tensor = checked(images, self.name, self.network.fc.weight.device)
        x = (resize_tf1(tensor.permute(0, 3, 1, 2).float(), SIDE) - 128) / 128
        with exact_float32():
            outputs: Outputs = self.network(x.contiguous(memory_format=torch.channels_last))
        return outputs


def load_inception(url: str, sha256: str | None = None, device: torch.device | str = "cpu") -> InceptionTF:
    """The extractor from the published weights, as published or as safetensors.

    Args:
        url: the file, or the folder that contains it under its published name, by path or fsspec URL.
        sha256: the hash that the file must have; None accepts any file.
        device: device to run it on.

    Raises:
        InputError: the file is missing or damaged, has another hash, or contains another network.
    """
    network, digest = FILE.load(url, sha256, lambda _: InceptionV3())
    fold_norms(network)
    return InceptionTF(network.to(device, memory_format=torch.channels_last), digest)  # type: ignore[call-overload]
