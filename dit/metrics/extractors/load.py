"""The table of feature extractors. A new one is a module beside this one and a row in `EXTRACTORS`.

Networks that are no part of this package are ONNX files, which the config describes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol, Self

import torch
from pydantic import Field, model_validator

from dit.metrics.extractors import demo_digits, dinov2, inception, onnx_file
from dit.metrics.extractors.base import FeatureExtractor
from dit.metrics.extractors.onnx_file import OnnxNetwork, load_onnx
from dit.weights import WeightsFile
from storage.config import Config, Location, added, operational


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
ONNX: Final = "onnx"

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[(*EXTRACTORS, ONNX)]


class ExtractorRef(Config):
    """A feature extractor and the location of its weights."""

    name: Name = Field(
        default="demo-digits",
        description=f"The network: {', '.join(f'``{name}`` is {row.help}' for name, row in EXTRACTORS.items())}, "
        f"``{ONNX}`` is any other one, as an ONNX file.",
    )
    weights: Location = operational()
    """Weights file of the network, or the folder that contains it, by path or fsspec URL."""
    sha256: str | None = operational(None, pattern=r"^[0-9a-fA-F]{64}$")
    """SHA-256 that the weights file must have, 64 hex digits. Null: any file is accepted."""
    onnx: OnnxNetwork | None = added(None)
    """What the network of an ONNX file takes and gives, for ``onnx`` alone."""

    @model_validator(mode="after")
    def _onnx_is_described(self) -> Self:
        if self.name == ONNX and self.onnx is None:
            raise ValueError("name: onnx needs onnx: its name, side, mean and deviation")
        if self.name != ONNX and self.onnx is not None:
            raise ValueError("onnx is for name: onnx alone")
        if self.onnx is not None and self.onnx.name in EXTRACTORS:
            raise ValueError(f"onnx.name: {self.onnx.name} is the name of another extractor; choose one of your own")
        return self

    @property
    def file(self) -> WeightsFile:
        """The weights file."""
        return onnx_file.FILE if self.name == ONNX else EXTRACTORS[self.name].file


def weights_sha256(ref: ExtractorRef) -> str:
    """The hash of the weights file, which stands for the extractor in the digests of what it measures.

    The file is read piece by piece, and the network is not built.

    Raises:
        InputError: the file is missing, or has another hash than ``ref`` says.
    """
    return ref.file.sha256(ref.weights, ref.sha256)


def load_extractor(ref: ExtractorRef, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor, ready to run on a device; an ONNX file runs on the CPU.

    Raises:
        InputError: the weights are missing or broken, or have another hash than ``ref`` says; or as `load_onnx`.
    """
    if ref.onnx is not None:
        return load_onnx(ref.weights, ref.sha256, ref.onnx)
    return EXTRACTORS[ref.name].load(ref.weights, ref.sha256, device)
