"""DINOv2 (Oquab et al., arXiv 2304.07193), in whose space FD-DINOv2 is taken (Stein et al., arXiv 2306.04675).

Names and shapes of the weights are those of the files that are published for torch hub: ViT-S, B and L
without registers. Those of transformers' ``Dinov2Model`` have other names.
"""

# B = batch, N = tokens, D = width, H, W = image sides, G = sides of the grids of patches

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.devices import exact_float32
from dit.metrics.extractors.base import Images, Outputs, checked
from dit.metrics.extractors.resize import resize_bicubic
from dit.weights import WeightsFile

WEIGHTS: Final = "dinov2_vitl14_pretrain.pth"
FILE: Final = WeightsFile(
    WEIGHTS,
    title="DINOv2",
    hint=f"dinov2 reads {WEIGHTS}, ViT-L/14 as published for torch hub; point evaluate.extractor.weights at it, by "
    "path or URL",
)
SIDE: Final = 224
PATCH: Final = 14
TRAINED_GRID: Final = 37
"""Side of the grid of patches in training, on images of 518 px: one learned position for each patch."""
OFFSET: Final = 0.1
"""The published network adds this to the side of the grid before it scales the positions to it."""
HEAD_WIDTH: Final = 64
EPS: Final = 1e-6
MEAN: Final = (0.485, 0.456, 0.406)
DEVIATION: Final = (0.229, 0.224, 0.225)


class Scale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same."""
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention with heads of 64 channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same."""
        q, k, v = self.qkv(x).unflatten(2, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each with a norm before and a learned scale after."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPS)
        self.attn = Attention(width)
        self.ls1 = Scale(width)
        self.norm2 = nn.LayerNorm(width, EPS)
        self.mlp = Mlp(width)
        self.ls2 = Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class VisionTransformer(nn.Module):
    """The network from resized images on."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TRAINED_GRID**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # used only in training, but contained in the file
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, EPS)

    def forward(self, images: Tensor) -> Tensor:
        """The class token (B, D) after the last norm, of images float32 (B, 3, 224, 224) normalised as ImageNet."""
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self._positions()
        out: Tensor = self.norm(self.blocks(tokens)[:, 0])
        return out

    def _positions(self) -> Tensor:
        """The positions (1, 1 + G G, D), scaled to the grid of 224 px."""
        first, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:].unflatten(1, (TRAINED_GRID, TRAINED_GRID))
        factor = (SIDE // PATCH + OFFSET) / TRAINED_GRID
        scaled = F.interpolate(grid.permute(0, 3, 1, 2), scale_factor=factor, mode="bicubic")
        return torch.cat([first, scaled.flatten(2).transpose(1, 2)], 1)


@dataclass(frozen=True)
class DinoV2:
    """The network as a `dit.metrics.extractors.base.FeatureExtractor`, in float32 without TF32."""

    network: VisionTransformer
    sha256: str
    name: str = "dinov2"
    version: int = 1
    preprocessing: str = "pillow-bicubic-224/imagenet"
    published: bool = False

    @property
    def dims(self) -> int:
        """D: 1024 for ViT-L, which FD-DINOv2 is defined with."""
        return self.network.cls_token.shape[2]

    def outputs(self, images: Images) -> Outputs:
        """Features alone; images and errors as in `__call__`."""
        return Outputs(self(images))

    @torch.no_grad()
    def __call__(self, images: Images) -> Tensor:
        """Features float32 (B, D) of images uint8 (B, H, W, 3).

        Raises:
            InputError: the images have another type or shape.
        """
        tensor = checked(images, self.name, self.network.cls_token.device)
        mean, deviation = (torch.tensor(each, device=tensor.device).view(3, 1, 1) for each in (MEAN, DEVIATION))
        x = (resize_bicubic(tensor.permute(0, 3, 1, 2).float(), SIDE) / 255 - mean) / deviation
        with exact_float32():
            features: Tensor = self.network(x)
        return features


def load_dinov2(url: str, sha256: str | None = None, device: torch.device | str = "cpu") -> DinoV2:
    """The extractor from the published weights, as published or as safetensors. The weights determine its size.

    Args:
        url: the file, or the folder that contains ViT-L's under its published name, by path or fsspec URL.
        sha256: the hash that the file must have; None accepts any file.
        device: device to run it on.

    Raises:
        InputError: the file is missing or damaged, has another hash, or contains another network.
    """
    network, digest = FILE.load(url, sha256, _build)
    return DinoV2(network.to(device), digest)


def _build(state: dict[str, Tensor]) -> VisionTransformer:
    """The network that has these weights."""
    return VisionTransformer(state["cls_token"].shape[2], sum(name.endswith(".ls1.gamma") for name in state))
