"""Latents to a checkpoint."""

import logging
import math
import time
from typing import Literal

import torch
from pydantic import Field, ValidationError

from dit.devices import Precision, device, dtype
from dit.diffusion.config import DiffusionConfig
from dit.diffusion.gaussian import GaussianDiffusion
from dit.export import CheckpointManifest, ModelCard, export
from dit.models.build import build
from dit.models.config import SIZES, DiTConfig
from dit.plots import curve
from dit.training import checkpoint
from dit.training.checkpoint import Measured
from dit.training.data import LatentBatches
from dit.training.ema import EMA
from dit.training.loop import StepResult, TrainState, train
from dit.training.ranks import Ranks, joined
from storage.config import Config, operational
from storage.errors import DitflowError, InputError
from storage.latents import LatentManifest, LatentReader
from storage.manifest import StageOutput
from storage.tracking import Tracker, publish

VERSION = 1
LOGGER = logging.getLogger(__name__)


class Shape(Config):
    """A transformer of any size."""

    depth: int = Field(ge=1)
    """Number of blocks."""
    width: int = Field(ge=4)
    """Numbers in a token."""
    heads: int = Field(ge=1)
    """Attention heads in a block."""


class ModelChoice(Config):
    """Which model to train. What the latents decide (size, channels, classes) is taken from them."""

    size: Literal["S", "B", "L", "XL"] | Shape = "XL"
    """A published size, or a shape of one's own."""
    patch_size: int = Field(2, ge=1)
    """Side of the square that becomes one token, in latent pixels."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Probability that training replaces a label by the null label."""
    conditional: bool = True
    """Whether the model is told the class."""

    def for_latents(self, latents: LatentManifest) -> DiTConfig:
        """The full config of the model for these latents.

        Raises:
            InputError: they do not fit each other.
        """
        size = self.size
        depth, width, heads = SIZES[size] if isinstance(size, str) else (size.depth, size.width, size.heads)
        channels, side, _ = latents.latent_shape
        try:
            return DiTConfig(
                input_size=side,
                in_channels=channels,
                patch_size=self.patch_size,
                depth=depth,
                width=width,
                heads=heads,
                label_dropout=self.label_dropout,
                num_classes=len(latents.class_names) if self.conditional else 0,
            )
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InputError(f"train.model: does not fit the latents: {reason}") from error


class TrainConfig(Config):
    """How a model is trained."""

    model: ModelChoice = ModelChoice()
    """The model."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The process that it learns to undo."""
    steps: int = Field(400_000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(256, ge=1)
    """Images in a step, of all ranks together."""
    learning_rate: float = Field(1e-4, gt=0)
    """Of AdamW, constant."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW."""
    ema_decay: float = Field(0.9999, ge=0, le=1)
    """Of the moving average of the weights, a step."""
    flips: bool = True
    """Train on images and mirror images alike; the latents must hold both."""
    precision: Precision = "float32"
    """Arithmetic of the forward pass; weights are float32 in any case."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides initial weights, order, noise and dropped labels."""
    log_every: int = operational(100, ge=1)
    """Steps between two records of the loss."""
    checkpoint_every: int = operational(5_000, ge=1)
    """Steps between two checkpoints: what a kill can cost."""
    keep_checkpoints: int = operational(2, ge=1)
    """How many of the newest checkpoints stay."""


def run(config: TrainConfig, latents: LatentManifest, *, out: StageOutput, tracker: Tracker) -> CheckpointManifest:
    """Train from the newest checkpoint to the last step on all ranks, and commit the model.

    Raises:
        InputError: model, latents and ranks do not fit each other.
        StorageError: the latents are not what was committed, or the disk is full.
        DitflowError: the loss or the gradient is not finite.
    """
    with joined() as ranks:
        model_config = config.model.for_latents(latents)
        batches = _batches(config, latents, ranks)
        state = _initial_state(config, model_config)
        history = checkpoint.load_newest(out, state)
        if state.step and ranks.first:
            LOGGER.info("resuming after step %d", state.step)
        _train(config, state, batches, history, ranks, out, tracker)
        if ranks.first:
            _commit(config, model_config, latents, state, history, out, tracker)
        ranks.wait()
        return CheckpointManifest.read(out.uri)


def _batches(config: TrainConfig, latents: LatentManifest, ranks: Ranks) -> LatentBatches:
    if config.batch_size % ranks.world_size:
        raise InputError(f"train.batch_size: {config.batch_size} does not divide among {ranks.world_size} ranks")
    if config.flips and latents.flips == 1:
        raise InputError("train.flips: these latents have no mirror images; encode with flips, or train without")
    return LatentBatches(
        reader=LatentReader(latents),
        batch_size=config.batch_size,
        seed=config.seed,
        flips=config.flips,
        num_classes=len(latents.class_names) if config.model.conditional else 0,
        label_dropout=config.model.label_dropout,
        ranks=ranks,
        device=device(),
    )


def _initial_state(config: TrainConfig, model_config: DiTConfig) -> TrainState:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build(model_config).to(device())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, weight_decay=config.weight_decay, fused=True)
    return TrainState(model, EMA(model, config.ema_decay), optimizer)


def _train(
    config: TrainConfig,
    state: TrainState,
    batches: LatentBatches,
    history: list[Measured],
    ranks: Ranks,
    out: StageOutput,
    tracker: Tracker,
) -> None:
    """Train to the last step, log, save, and add what was measured to the history."""
    process = GaussianDiffusion.from_config(config.diffusion).to(batches.device)
    autocast = None if config.precision == "float32" else dtype(config.precision)
    logged, since = state.step, time.monotonic()
    for result in train(state, process, batches, stop=config.steps, ranks=ranks, autocast=autocast):
        logs = result.step % config.log_every == 0 or result.step == config.steps
        saves = result.step % config.checkpoint_every == 0 and result.step < config.steps
        if not logs and not saves:
            continue
        values = _measure(result, ranks)  # before saving too: nothing that is not finite is ever resumed from
        if logs:
            history.append(Measured(step=result.step, values=values))
            speed = (result.step - logged) * config.batch_size / (time.monotonic() - since)
            logged, since = result.step, time.monotonic()
            tracker.metrics(values | {"images_per_second": speed}, step=result.step)
            tracker.progress(result.step, config.steps, "steps")
        if saves and ranks.first:
            checkpoint.save(out, state, history, keep=config.keep_checkpoints)


def _measure(result: StepResult, ranks: Ranks) -> dict[str, float]:
    values = {name: ranks.mean(term) for name, term in result.terms.items()}
    values["gradient_norm"] = ranks.mean(result.gradient_norm)
    if not all(map(math.isfinite, values.values())):
        found = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise DitflowError(f"training went astray at step {result.step:,}: {found}; lower train.learning_rate")
    return values


def _commit(
    config: TrainConfig,
    model_config: DiTConfig,
    latents: LatentManifest,
    state: TrainState,
    history: list[Measured],
    out: StageOutput,
    tracker: Tracker,
) -> None:
    losses = [measured.values["loss"] for measured in history]
    picture = publish(out, tracker, "loss.png", curve([measured.step for measured in history], losses))
    card = ModelCard(
        model=model_config,
        diffusion=config.diffusion,
        vae=latents.vae,
        resolution=latents.resolution,
        class_names=latents.class_names,
        steps=state.step,
    )
    card, files = export(out, card, state.ema.state_dict(), state.model.state_dict())
    counts = {"steps": state.step, "images_seen": state.step * config.batch_size}
    counts["parameters"] = sum(parameter.numel() for parameter in state.model.parameters())
    metrics = {f"final_{name}": value for name, value in history[-1].values.items()}
    out.commit(CheckpointManifest, [*files, picture], counts=counts, metrics=metrics, card=card)
