"""Feature extractors: the networks in whose spaces images are compared."""

# B = batch, H = W = image sides, D = features

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import InputError

Images = NDArray[np.uint8] | Tensor
"""uint8 (B, H, W, 3)."""


@dataclass(frozen=True)
class Outputs:
    """Outputs of an extractor for some images, in float32."""

    features: Tensor
    """(B, D)."""
    logits: Tensor | None = None
    """Logits (B, C) of its classes, if it has any."""
    spatial: Tensor | None = None
    """Spatial features (B, S), as sFID needs them, if the network has a layer agreed for them."""

    @classmethod
    def of(cls, parts: "Sequence[Outputs]") -> Self:
        """The outputs of several batches of one network, at least one, concatenated."""
        first = parts[0]
        return cls(
            torch.cat([part.features for part in parts]),
            None if first.logits is None else torch.cat([part.logits for part in parts if part.logits is not None]),
            None if first.spatial is None else torch.cat([part.spatial for part in parts if part.spatial is not None]),
        )

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        logits = None if self.logits is None else self.logits.to(device)
        spatial = None if self.spatial is None else self.spatial.to(device)
        return type(self)(self.features.to(device), logits, spatial)


class FeatureExtractor(Protocol):
    """A fixed network. Distances by different extractors, or other weights, cannot be compared."""

    @property
    def name(self) -> str:
        """Name of the network, such as ``demo-digits``."""

    @property
    def version(self) -> int:
        """Raised when the same weights give other features."""

    @property
    def dims(self) -> int:
        """D."""

    @property
    def preprocessing(self) -> str:
        """Id of the preprocessing of the pixels."""

    @property
    def sha256(self) -> str:
        """Hash of the weights file."""

    @property
    def published(self) -> bool:
        """Whether these are the network and the weights that FID, sFID, KID and IS are defined with."""

    def outputs(self, images: Images) -> Outputs:
        """All outputs for images uint8 (B, H, W, 3); errors as in `__call__`."""

    def __call__(self, images: Images) -> Tensor:
        """Features float32 (B, D) of images uint8 (B, H, W, 3).

        Raises:
            InputError: the extractor cannot read images of this size.
        """


def checked(images: Images, name: str, device: torch.device) -> Tensor:
    """The images (B, H, W, 3) on a device.

    Args:
        images: uint8 images.
        name: name of the extractor, for errors.
        device: where to put them.

    Raises:
        InputError: they are not uint8 images (B, H, W, 3).
    """
    tensor = torch.as_tensor(images, device=device)
    if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[3] != 3:
        raise InputError(f"{name}: needs uint8 images (B, H, W, 3), not {tensor.dtype} {tuple(tensor.shape)}")
    return tensor
