"""How fast a machine does each kind of work, for plans: measured in seconds on small pieces of the real work."""

# B = batch, C = channels, h = side of a latent or an image, H = image side

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from pydantic import Field

from dit.devices import Arithmetic, arithmetic, device, dtype
from dit.metrics.extractors.load import ExtractorRef, load_extractor
from dit.models.build import build
from dit.models.config import ModelConfig
from dit.models.cost import cost
from dit.vae import VaeRef, load_vae
from storage import uri
from storage.archives.open import Archive
from storage.config import Config
from storage.images.transforms import UnreadableImage, inspect
from storage.parallel import threads

SECONDS = 1.0
"""How long a piece of work is repeated for, after the first time."""
IMAGES = 256
"""Images that are read to see how fast that goes."""
BLOCKS = 2
"""Transformer blocks that stand for all: they are alike."""
CPU_FLOPS = 10**11
"""Work of one step that a CPU is measured with."""


class Rates(Config):
    """What a machine does in a second. What is not given is measured where it is needed."""

    shard: float | None = Field(None, gt=0)
    """Images read, checked and packed in a second, on all cores."""
    encode: float | None = Field(None, gt=0)
    """Images passed through the autoencoder's encoder in a second, on one rank."""
    train: float | None = Field(None, gt=0)
    """FLOP of training steps in a second, on one rank."""
    sample: float | None = Field(None, gt=0)
    """FLOP of the model's forward passes in a second, on one rank."""
    decode: float | None = Field(None, gt=0)
    """Latents decoded to images in a second, on one rank."""
    evaluate: float | None = Field(None, gt=0)
    """Images passed through the feature extractor in a second."""


def shard_rate(archive: Archive, workers: int) -> tuple[float, float]:
    """Images a second read, checked and hashed, spread over the archive, and their mean size in bytes.

    Raises:
        StorageError: one cannot be read.
    """
    members = archive.members[:: max(1, len(archive.members) // IMAGES)][:IMAGES]

    def look(number: int) -> int:
        data = archive.read(members[number])
        with suppress(UnreadableImage):  # which the stage will list
            inspect(data)
        uri.sha256(data)  # as a part of its tar
        return len(data)

    begin = time.perf_counter()
    with threads(workers) as pool:
        sizes = list(pool.map(look, range(len(members))))
    return len(members) / (time.perf_counter() - begin), sum(sizes) / len(sizes)


def autoencoder_rates(ref: VaeRef, resolution: int, precision: Arithmetic) -> tuple[float, float]:
    """Images encoded and latents decoded a second.

    Raises:
        InputError: the autoencoder is missing or broken.
    """
    vae = load_vae(ref, device(), dtype(precision))
    batch = 8 if device().type == "cuda" else 1
    images = torch.zeros(batch, resolution, resolution, 3, dtype=torch.uint8)
    with arithmetic(precision):
        latents, _ = vae.encode(images)
        return batch * _rate(lambda: vae.encode(images)), batch * _rate(lambda: vae.decode(latents))


def model_rates(config: ModelConfig, batch: int, precision: Arithmetic) -> tuple[float, float]:
    """FLOP a second in training steps and in forward passes of a model, found on some of its blocks.

    Args:
        config: the model.
        batch: images of a rank in a step; a CPU does no more of them than it can in a second or so.
        precision: of the forward pass.
    """
    if hasattr(config, "depth"):
        config = config.model_copy(update={"depth": min(config.depth, BLOCKS)})
    where, work = device(), cost(config)
    if where.type == "cpu":
        batch = min(batch, max(1, CPU_FLOPS // work.training_flops))
    model = build(config).to(where)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, device=where)
    y = torch.zeros(batch, dtype=torch.long, device=where) if config.num_classes else None
    lower = dtype(precision)

    def forward() -> torch.Tensor:
        with torch.autocast(where.type, lower, enabled=lower != torch.float32):
            out: torch.Tensor = model(x, torch.ones(batch, device=where), y)
        return out

    def step() -> None:
        forward().float().square().mean().backward()
        model.zero_grad()

    with arithmetic(precision):
        training = _rate(step)
        with torch.no_grad():
            return training * batch * work.training_flops, _rate(forward) * batch * 2 * work.macs


def extractor_rate(ref: ExtractorRef, resolution: int) -> float:
    """Images a second that an extractor takes the features of.

    Raises:
        InputError: its weights are missing or broken, or it cannot read such images.
    """
    extractor, batch = load_extractor(ref, device()), 32 if device().type == "cuda" else 8
    images = torch.zeros(batch, resolution, resolution, 3, dtype=torch.uint8)
    return batch * _rate(lambda: extractor.outputs(images))


def _rate(work: Callable[[], Any]) -> float:
    """How often a second something can be done, not counting the first time."""
    work()
    _wait()
    begin, times = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < SECONDS or not times:
        work()
        _wait()
        times += 1
    return times / passed


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
