"""Which feature extractor, and how it is loaded."""

from typing import Literal

import torch

from dit.metrics.extractors.base import FeatureExtractor
from storage.config import Config, operational


class ExtractorRef(Config):
    """Which extractor, and where its weights lie."""

    name: Literal["demo-digits", "inception-tf", "dinov2"] = "demo-digits"
    """The network: ``demo-digits`` is the digits classifier that comes with the demo, ``inception-tf`` that of FID,
    ``dinov2`` that of FD-DINOv2."""
    weights: str = operational()
    """Folder or file of the weights, by path or fsspec URL."""
    sha256: str | None = operational(None, pattern=r"^[0-9a-fA-F]{64}$")
    """Hash that the weights file must have; any file is taken when it is absent."""


def load_extractor(ref: ExtractorRef, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor, ready to run on a device.

    Raises:
        InputError: the weights are missing or broken, or have another hash than ``ref`` says.
    """
    if ref.name == "inception-tf":
        from dit.metrics.extractors.inception import load_inception  # only the network that is asked for

        return load_inception(ref.weights, ref.sha256, device)
    if ref.name == "dinov2":
        from dit.metrics.extractors.dinov2 import load_dinov2

        return load_dinov2(ref.weights, ref.sha256, device)
    from dit.metrics.extractors.demo_digits import load_digits_classifier

    return load_digits_classifier(ref.weights, ref.sha256, device)
