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
    """What an extractor makes of images, in float32."""

    features: Tensor
    """(B, D)."""
    logits: Tensor | None = None
    """Of its classes (B, C), if it has any."""
    spatial: Tensor | None = None
    """Features that still know where things are (B, S), if the network has an agreed layer for them."""

    @classmethod
    def of(cls, parts: "Sequence[Outputs]") -> Self:
        """Those of several batches, at least one and all of one network, together."""
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
    """A fixed network. Distances taken with different extractors, or weights, do not compare."""

    @property
    def name(self) -> str:
        """Which network, such as ``demo-digits``."""

    @property
    def version(self) -> int:
        """Grows when the same weights would give other features."""

    @property
    def dims(self) -> int:
        """D."""

    @property
    def preprocessing(self) -> str:
        """Id of what is done to the pixels before the network sees them."""

    @property
    def sha256(self) -> str:
        """Hash of the weights file."""

    @property
    def published(self) -> bool:
        """Whether these are the network and the weights that FID, sFID, KID and IS are defined with."""

    def outputs(self, images: Images) -> Outputs:
        """All that the network has to say of images uint8 (B, H, W, 3); errors as in `__call__`."""

    def __call__(self, images: Images) -> Tensor:
        """Features float32 (B, D) of images uint8 (B, H, W, 3).

        Raises:
            InputError: the extractor cannot read images of this size.
        """


def checked(images: Images, name: str, device: torch.device) -> Tensor:
    """The images (B, H, W, 3) on the device of the extractor of that name.

    Raises:
        InputError: they are no uint8 images.
    """
    tensor = torch.as_tensor(images, device=device)
    if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[3] != 3:
        raise InputError(f"{name}: reads uint8 images (B, H, W, 3), not {tensor.dtype} {tuple(tensor.shape)}")
    return tensor
