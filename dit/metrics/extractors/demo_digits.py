"""The demo's feature extractor: a small classifier of handwritten digits, trained in `flows.demo.train_classifier`."""

# B = batch, D = 64 features

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dit.metrics.extractors.base import Images, Outputs
from dit.weights import WeightsFile
from storage.errors import InputError

WEIGHTS: Final = "model.safetensors"
FILE: Final = WeightsFile(
    WEIGHTS,
    title="the digits classifier",
    hint=f"demo-digits reads {WEIGHTS}, as in flows/demo/classifier; point evaluate.extractor.weights at its folder",
)
SIDE: Final = 32
"""Side of the images in pixels."""
DIMS: Final = 64
CLASSES: Final = 10
CLASS_NAMES: Final = tuple(map(str, range(CLASSES)))


class DigitsClassifier(nn.Module):
    """Three convolutions and two linear layers on 32x32 RGB images."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_stage(3, 16),
            *_stage(16, 32),
            *_stage(32, 64),
            nn.Flatten(),
            nn.Linear(64 * (SIDE // 8) ** 2, DIMS),
            nn.SiLU(),
        )
        self.head = nn.Linear(DIMS, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features float32 (B, 64) and logits (B, 10) of images uint8 or float (B, 32, 32, 3) in 0..255."""
        features = self.trunk(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
        return features, self.head(features)


def _stage(width_in: int, width_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width_in, width_out, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2)


@dataclass(frozen=True)
class DemoDigits:
    """The trained classifier as a `dit.metrics.extractors.base.FeatureExtractor`."""

    network: DigitsClassifier
    sha256: str
    name: str = "demo-digits"
    version: int = 1
    dims: int = DIMS
    preprocessing: str = "bicubic-32px/127.5-1"
    published: bool = False
    class_names: tuple[str, ...] = CLASS_NAMES

    @torch.no_grad()
    def outputs(self, images: Images) -> Outputs:
        """Features (B, 64) and logits (B, 10); images and errors as in `__call__`."""
        return Outputs(*self.network(self._prepared(images)))

    def __call__(self, images: Images) -> Tensor:
        """Features float32 (B, 64) of images uint8 (B, H, H, 3), H at most 32.

        Raises:
            InputError: the images are larger, not square, or of another type.
        """
        return self.outputs(images).features

    @torch.no_grad()
    def logits(self, images: Images) -> Tensor:
        """Logits float32 (B, 10) over the digits; images and errors as in `__call__`."""
        logits: Tensor = self.network(self._prepared(images))[1]
        return logits

    def classify(self, images: Images) -> Tensor:
        """Labels int64 (B,) in 0..9; images and errors as in `__call__`."""
        return self.logits(images).argmax(1)

    def accuracy(self, images: Images, labels: NDArray[np.integer] | Tensor) -> float:
        """The share in 0..1 of images that get their label; images and errors as in `__call__`."""
        predicted = self.classify(images)
        return float((predicted == torch.as_tensor(labels, device=predicted.device)).double().mean())

    def _prepared(self, images: Images) -> Tensor:
        """Images (B, 32, 32, 3) in 0..255; smaller ones are enlarged."""
        tensor = torch.as_tensor(images, device=self.network.head.weight.device)
        side = tensor.shape[1]
        if tensor.dtype != torch.uint8 or tensor.shape[1:] != (side, side, 3) or side > SIDE:
            raise InputError(
                f"{self.name}: needs square uint8 images of at most {SIDE}x{SIDE}x3, not {tensor.dtype} of "
                f"{tuple(tensor.shape[1:])}; choose another extractor"
            )
        if side == SIDE:
            return tensor
        large = nn.functional.interpolate(tensor.permute(0, 3, 1, 2).float(), size=SIDE, mode="bicubic")
        return large.permute(0, 2, 3, 1)


def load_digits_classifier(url: str, sha256: str | None = None, device: torch.device | str = "cpu") -> DemoDigits:
    """The classifier from its weights file, or from a folder with ``model.safetensors``.

    Args:
        url: the file or folder, by path or fsspec URL.
        sha256: the hash that the file must have; None accepts any file.
        device: device to run it on.

    Raises:
        InputError: the file is missing or broken, is not this classifier, or has another hash.
    """
    network, digest = FILE.load(url, sha256, lambda _: DigitsClassifier())
    return DemoDigits(network.to(device), digest)
