"""Speed of this machine at each kind of work, for plans, measured within seconds on small pieces of real work."""

# B = batch, C = channels, h = side of a latent or an image, H = image side

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dit.devices import Arithmetic, arithmetic, device, dtype
from dit.metrics.extractors.load import ExtractorRef, load_extractor
from dit.metrics.kernel import kernel_distance
from dit.metrics.precision_recall import precision_recall
from dit.models.build import build
from dit.models.config import ModelConfig
from dit.models.cost import cost
from dit.vae import VaeRef, load_vae

SECONDS = 1.0
"""How long a piece of work is repeated, after a first run."""
LEAST_RUNS = 3
"""How often it is repeated at least."""
LONG_SECONDS = 5.0
"""A first run on a CPU that takes so long is not repeated."""
BLOCKS = 2
"""Transformer blocks that are measured, in place of all: they are alike."""
CPU_FLOPS = 5 * 10**10
"""FLOP of the step that is measured on a CPU."""
CPU_PIXELS = 2**16
"""Pixels of the batch that an autoencoder is measured with on a CPU: a 256 px image; extractors have eight times as
many."""
COMPARED = 2048
"""Features of either set whose comparison is measured."""


def at_once(world_size: int) -> int:
    """Ranks that work at the same time: on a CPU they share its cores."""
    return world_size if device().type == "cuda" else 1


def beside(decoding: float, network: float) -> float:
    """Seconds that images take which are decoded on CPU cores while a network works: on a CPU both share the cores.

    Args:
        decoding: seconds of the decoding alone.
        network: seconds of the network alone.
    """
    return max(decoding, network) if device().type == "cuda" else decoding + network


def encoder_rate(ref: VaeRef, resolution: int, precision: Arithmetic, batch: int) -> float:
    """Images encoded a second, ``batch`` at a time; on a CPU fewer if they are large.

    Raises:
        InputError: the autoencoder is missing or broken.
    """
    vae, images = load_vae(ref, device(), dtype(precision)), _images(_fitting(batch, resolution), resolution)
    with arithmetic(precision):
        return len(images) * _rate(lambda: vae.encode(images))


def decoder_rate(ref: VaeRef, resolution: int, precision: Arithmetic, batch: int) -> float:
    """Latents of images of this side decoded a second. Arguments and errors as `encoder_rate`."""
    vae, batch = load_vae(ref, device(), dtype(precision)), _fitting(batch, resolution)
    side = resolution // vae.downsample
    latents = torch.zeros(batch, vae.channels, side, side)
    with arithmetic(precision):
        return batch * _rate(lambda: vae.decode(latents))


def training_rate(config: ModelConfig, batch: int, precision: Arithmetic) -> float:
    """FLOP a second in training steps of a model, measured on some of its blocks.

    Args:
        config: config of the model.
        batch: images of a rank in a step; a CPU is measured with fewer.
        precision: precision of the forward pass.
    """
    config, batch, forward, model = _piece(config, batch, precision)

    def step() -> None:
        forward().float().square().mean().backward()
        model.zero_grad()

    with arithmetic(precision):
        return _rate(step) * batch * cost(config).training_flops


def forward_rate(config: ModelConfig, batch: int, precision: Arithmetic) -> float:
    """FLOP a second in forward passes of a model, measured on some of its blocks. Arguments as `training_rate`."""
    config, batch, forward, _ = _piece(config, batch, precision)
    with arithmetic(precision), torch.no_grad():
        return _rate(forward) * batch * 2 * cost(config).macs


def _piece(
    config: ModelConfig, batch: int, precision: Arithmetic
) -> tuple[ModelConfig, int, Callable[[], torch.Tensor], nn.Module]:
    """Config of the model with fewer blocks, the batch to measure it with, its forward pass, and the model."""
    if hasattr(config, "depth"):
        config = config.model_copy(update={"depth": min(config.depth, BLOCKS)})
    where = device()
    if where.type == "cpu":
        batch = min(batch, max(1, CPU_FLOPS // cost(config).training_flops))
    model = build(config).to(where)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, device=where)
    y = torch.zeros(batch, dtype=torch.long, device=where) if config.num_classes else None
    lower = dtype(precision)

    def forward() -> torch.Tensor:
        with torch.autocast(where.type, lower, enabled=lower != torch.float32):
            out: torch.Tensor = model(x, torch.ones(batch, device=where), y)
        return out

    return config, batch, forward, model


def extractor_rate(ref: ExtractorRef, resolution: int, batch: int) -> float:
    """Images a second that pass through an extractor, ``batch`` at a time; on a CPU fewer if they are large, but
    eight for each thread.

    Raises:
        InputError: its weights are missing or broken, or it cannot read such images.
    """
    size = max(_fitting(batch, resolution, CPU_PIXELS * 8), min(batch, 8 * torch.get_num_threads()))
    extractor, images = load_extractor(ref, device()), _images(size, resolution)
    return len(images) * _rate(lambda: extractor.outputs(images))


def comparison_rate(ref: ExtractorRef) -> float:
    """Pairs of features a second that are compared for the kernel distance, precision and recall.

    Raises:
        InputError: the extractor's weights are missing or broken.
    """
    features = torch.randn(COMPARED, load_extractor(ref).dims).to(device())

    def compare() -> None:
        kernel_distance(features, features)
        precision_recall(features, features, "fp32")

    return pairs(COMPARED, COMPARED) * _rate(compare)


def pairs(reference: int, samples: int) -> int:
    """Pairs of features within and between two sets."""
    return reference**2 + samples**2 + reference * samples


def _fitting(batch: int, resolution: int, pixels: int = CPU_PIXELS) -> int:
    return batch if device().type == "cuda" else max(1, min(batch, pixels // resolution**2))


def _images(count: int, resolution: int) -> torch.Tensor:
    return torch.zeros(count, resolution, resolution, 3, dtype=torch.uint8)


def _rate(work: Callable[[], Any]) -> float:
    """How often a second ``work`` runs if nothing disturbs it: by its fastest run, or by its first if that is long."""
    first = _seconds(work)
    if first > LONG_SECONDS and device().type == "cpu":
        return 1 / first
    runs = list[float]()
    while sum(runs) < SECONDS or len(runs) < LEAST_RUNS:
        runs.append(_seconds(work))
    return 1 / min(runs)


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
