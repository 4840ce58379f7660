"""Train the demo's feature extractor: ``python -m flows.demo.train_classifier`` (a minute on two cores)."""

import json
import logging
import time
from typing import Final

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dit.metrics.extractors.demo_digits import WEIGHTS, DigitsClassifier, load_digits_classifier
from flows.demo import CLASSIFIER, METRICS
from flows.demo.digits import digit_images
from storage import uri

# B = batch, H = W = 32 pixels

SEED: Final = 0
STEPS: Final = 1500
BATCH: Final = 64
LEARNING_RATE: Final = 2e-3
LABEL_SMOOTHING: Final = 0.1
"""Share of the target that is spread over all digits; it bounds the features."""


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images as float (B, H, W, 3) in 0..255, slightly rotated, scaled, shifted and blurred, with noise.

    Shifts make up for the small data set; an autoencoder and a sampler add blur and noise.
    """
    count = len(images)
    jitter = torch.randn(count, 2, 3, generator=generator) * torch.tensor([0.06, 0.06, 0.05])
    pixels = images.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(torch.eye(2, 3) + jitter, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="zeros", align_corners=False)
    blurred = F.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
    share = torch.rand(count, 1, 1, 1, generator=generator)
    noise = 12 * torch.rand(count, 1, 1, 1, generator=generator) * torch.randn(moved.shape, generator=generator)
    return (torch.lerp(moved, blurred, share) + noise).clamp(0, 255).permute(0, 2, 3, 1)


def train(images: NDArray[np.uint8], labels: NDArray[np.int64], steps: int = STEPS) -> DigitsClassifier:
    """A classifier fitted to uint8 images (N, H, W, 3) and labels (N,)."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    network = DigitsClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    pixels, targets = torch.from_numpy(images), torch.from_numpy(labels)
    for step in range(steps):
        rows = torch.randint(len(pixels), (BATCH,), generator=generator)
        _, logits = network(augment(pixels[rows], generator))
        loss = F.cross_entropy(logits, targets[rows], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            logging.info("step %d: loss %.3f", step, loss.item())
    return network.eval()


def main() -> None:
    """Train, save and measure."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.perf_counter()
    network = train(*digit_images("train"))
    seconds = time.perf_counter() - start
    uri.write(str(CLASSIFIER / WEIGHTS), safetensors.torch.save(network.half().state_dict()))
    classifier = load_digits_classifier(str(CLASSIFIER))
    metrics = {
        "held_out_accuracy": round(classifier.accuracy(*digit_images("held_out")), 4),
        "sha256": classifier.sha256,
        "train_seconds": round(seconds, 1),
    }
    uri.write(str(CLASSIFIER / METRICS), json.dumps(metrics, indent=2).encode() + b"\n")
    logging.info("%s: %s", CLASSIFIER, metrics)


if __name__ == "__main__":
    main()
