"""The demo's data and networks: small enough to ship, real enough to show every stage at work."""

from pathlib import Path
from typing import Final

VAE: Final = Path(__file__).parent / "vae"
"""Folder of the shipped autoencoder: 32x32 RGB to latents of 4x8x8."""
CLASSIFIER: Final = Path(__file__).parent / "classifier"
"""Folder of the shipped digits classifier, the demo's feature extractor."""
METRICS: Final = "metrics.json"
"""What a training script measured, beside the weights it wrote."""
