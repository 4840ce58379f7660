"""What is measured, and by which extractor."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiny
import torch
import torch.nn.functional as F
from PIL import Image

from dit import sample
from dit.evaluate import EvaluateConfig
from dit.export import CheckpointManifest
from dit.metrics.extractors.base import Images, Outputs
from dit.metrics.extractors.demo_digits import load_digits_classifier
from dit.sample import SampleManifest
from storage.rows.store import RowWriter

LEFT = (tiny.WIDTH - tiny.SIDE) // 2


def pixels(pictures: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a split, read without the product."""
    files = sorted((pictures / split).rglob("*.png"))
    images = [np.asarray(Image.open(path))[:, LEFT : LEFT + tiny.SIDE] for path in files]
    return np.stack(images), np.array([tiny.CLASSES.index(path.parent.name) for path in files], np.int32)


def as_samples(
    root: Path,
    checkpoint: CheckpointManifest,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...] = tiny.CLASSES,
) -> SampleManifest:
    """Any images in the place of a model's samples."""
    out = tiny.output(root, SampleManifest, tiny.SAMPLING, checkpoint=checkpoint)
    writer = RowWriter(out, sample.layout(len(images), 64, tiny.SIDE), {})
    for block in writer.missing():
        start, stop = writer.bounds(block)
        writer.write(block, {"image": images[start:stop], "label": labels[start:stop]})
    counts, conditions = {"images": len(images)}, {"count": len(images)}
    return out.commit(
        SampleManifest,
        writer.finish(),
        counts=counts,
        resolution=tiny.SIDE,
        class_names=class_names,
        conditions=conditions,
    )


def fd(config: EvaluateConfig, one: np.ndarray, other: np.ndarray) -> float:
    """The Fréchet distance of the extractor's features, by NumPy."""
    extractor = load_digits_classifier(config.extractor.weights)
    a, b = (extractor(images).double().numpy() for images in (one, other))
    s1, s2, gap = np.cov(a.T), np.cov(b.T), a.mean(0) - b.mean(0)
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(0))
    return float(gap @ gap + np.trace(s1) + np.trace(s2) - 2 * roots.sum())


@dataclass(frozen=True)
class Coarse:
    """An extractor without weights: a picture's mean by place and colour, in three layers."""

    published: bool
    name: str = "inception-tf"
    version: int = 1
    dims: int = 12
    preprocessing: str = "none"
    sha256: str = "6726825d" + 56 * "0"

    def outputs(self, images: Images) -> Outputs:
        pixels = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
        features = F.adaptive_avg_pool2d(pixels, 2).flatten(1)
        return Outputs(features, 9 * features[:, :5], F.adaptive_avg_pool2d(pixels, 3).flatten(1))

    def __call__(self, images: Images) -> torch.Tensor:
        return self.outputs(images).features
