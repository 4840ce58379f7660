"""The table of feature extractors. A new one is a module beside this one and a row in `EXTRACTORS`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol

import torch
from pydantic import Field

from dit.metrics.extractors import demo_digits, dinov2, inception
from dit.metrics.extractors.base import FeatureExtractor
from dit.weights import WeightsFile
from storage.config import Config, Location, operational


class _Load(Protocol):
    def __call__(self, url: str, sha256: str | None, device: torch.device | str) -> FeatureExtractor: ...


@dataclass(frozen=True)
class Extractor:
    """One network.

    Args:
        help: what it is, for the form.
        file: its weights file.
        load: reads the weights, checks their hash and puts the network on a device.
    """

    help: str
    file: WeightsFile
    load: _Load


EXTRACTORS: Final = {
    "demo-digits": Extractor("the demo's digits classifier", demo_digits.FILE, demo_digits.load_digits_classifier),
    "inception-tf": Extractor("Inception-v3 as FID uses it", inception.FILE, inception.load_inception),
    "dinov2": Extractor("DINOv2 as FD-DINOv2 uses it", dinov2.FILE, dinov2.load_dinov2),
}

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(EXTRACTORS)]


class ExtractorRef(Config):
    """A feature extractor and the location of its weights."""

    name: Name = Field(
        "demo-digits",
        description=f"The network: {', '.join(f'``{name}`` is {row.help}' for name, row in EXTRACTORS.items())}.",
    )
    weights: Location = operational()
    """Weights file of the network, or the folder that contains it, by path or fsspec URL."""
    sha256: str | None = operational(None, pattern=r"^[0-9a-fA-F]{64}$")
    """SHA-256 that the weights file must have, 64 hex digits. Null: any file is accepted."""


def weights_sha256(ref: ExtractorRef) -> str:
    """The hash of the weights file, which stands for the extractor in the digests of what it measures.

    The file is read piece by piece, and the network is not built.

    Raises:
        InputError: the file is missing, or has another hash than ``ref`` says.
    """
    return EXTRACTORS[ref.name].file.sha256(ref.weights, ref.sha256)


def load_extractor(ref: ExtractorRef, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor, ready to run on a device.

    Raises:
        InputError: the weights are missing or broken, or have another hash than ``ref`` says.
    """
    return EXTRACTORS[ref.name].load(ref.weights, ref.sha256, device)
