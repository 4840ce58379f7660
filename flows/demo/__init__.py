"""The demo's images and networks, small enough to be part of the package."""

from pathlib import Path
from typing import Final

VAE: Final = Path(__file__).parent / "vae"
"""Folder of the shipped autoencoder: 32x32 RGB to latents of 4x8x8."""
CLASSIFIER: Final = Path(__file__).parent / "classifier"
"""Folder of the shipped digits classifier, the demo's feature extractor."""
METRICS: Final = "metrics.json"
"""Name of the file with a training script's measurements, beside the weights."""
