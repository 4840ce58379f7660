"""The state in which training starts, and how its steps are taken."""

import logging
import math
from collections.abc import Callable
from functools import partial
from uuid import uuid4

import torch
from torch import nn

from dit.devices import device, dtype
from dit.diffusion.config import EDMConfig
from dit.export import ModelCard, power_average
from dit.models.build import build
from dit.models.config import ModelConfig
from dit.ranks import Ranks
from dit.training import origin, power
from dit.training.config import TrainConfig
from dit.training.data import Data, open_data
from dit.training.ema import EMA, Decay
from dit.training.loop import StepConfig, TrainState
from dit.training.parallelize import shard
from dit.training.per_block import choose_attention, compile_blocks, recompute_blocks
from dit.training.trainable import choose
from storage.errors import InputError
from storage.latents import LatentManifest

LOGGER = logging.getLogger(__name__)


def decays(config: TrainConfig) -> dict[str, float | Decay]:
    """The decays per step of the averages of the weights, by name."""
    halflife = config.ema_halflife_images
    first = config.ema_decay if halflife is None else 0.5 ** (config.batch_size / halflife)
    constant = {"ema": first} | {f"ema-{decay}": decay for decay in config.ema_decays}
    return constant | {power_average(width): _power(width) for width in config.ema_power}


def _power(width: float) -> Decay:
    exponent = power.exponent(width)
    return lambda step: power.decay(exponent, step + 1)


def _adam_eps(config: TrainConfig, model_config: ModelConfig) -> float:
    """AdamW's eps for our loss. With EDM it is the mean over an image's numbers; the published one is their sum."""
    numbers = model_config.in_channels * model_config.input_size**2
    return config.eps / numbers if isinstance(config.diffusion, EDMConfig) else config.eps


def check_start(config: TrainConfig, card: ModelCard) -> None:
    """Check that the model can start as the config says.

    Raises:
        InputError: what it is to start from is absent or does not fit, or ``train.freeze`` or ``train.lora`` does not
            fit the model.
    """
    if config.init or config.freeze:
        with torch.device("meta"):
            model = build(card.model)
            prepared(config)(model)
        _found(config, card, model)


def prepared(config: TrainConfig) -> Callable[[nn.Module], None]:
    """What chooses the parameters of a model that are trained."""
    return partial(choose, freeze=config.freeze, lora=config.lora)


def _found(config: TrainConfig, card: ModelCard, model: nn.Module) -> tuple[origin.Origin, origin.Fit] | None:
    """What the model, frozen as it will be, starts from, and what of it fits; None for random weights."""
    if config.init is None:
        return None
    source = origin.open_origin(config.init, card.model)
    found = origin.fit(source, card.model, card.class_names)
    origin.check_fit(found, config.init)
    idle = [name for name, p in model.named_parameters() if name in found.other and not p.requires_grad]
    if idle:
        raise InputError(f'train.freeze: {idle[0]} is made new and must be trained; add the pattern "!{idle[0]}"')
    return source, found


def _begin(config: TrainConfig, card: ModelCard, model: nn.Module, ranks: Ranks) -> None:
    """Take the weights to start from."""
    begun = _found(config, card, model)
    if begun is None:
        return
    source, found = begun
    origin.take(model, source, found)
    for note in source.notes if ranks.first else ():
        LOGGER.info("train.init: %s: %s", source.where, note)
    if ranks.first and found.other:
        LOGGER.warning("train.init: new or unused, as it does not fit %s: %s", source.where, origin.described(found))
    if ranks.first and not origin.learned_the_same(source.diffusion, config.diffusion):
        LOGGER.warning("train.init: %s was trained for another process than train.diffusion", source.where)
    if ranks.first and source.channels != card.channels:
        text = "train.init: %s was trained on latents of another scale (train.normalise), which this run has to unlearn"
        LOGGER.warning(text, source.where)


def initial_state(config: TrainConfig, card: ModelCard, ranks: Ranks) -> TrainState:
    """The state before the first step: the model on the device, shared among the ranks, its averages and AdamW.

    Raises:
        InputError: as `check_start`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build(card.model)
        prepared(config)(model)
    model.to(device())
    choose_attention(model, autocast(config))
    _begin(config, card, model, ranks)
    if config.compile:
        compile_blocks(model)
    if config.checkpoint_activations:
        recompute_blocks(model)
    shard(model, config.parallel, ranks, device())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        config.learning_rate,
        config.betas,
        _adam_eps(config, card.model),
        config.weight_decay,
        fused=True,
    )
    if ranks.first and (config.freeze or config.lora):
        LOGGER.info("%s parameters are trained", f"{sum(parameter.numel() for parameter in trained):,}")
    averages = {name: EMA(model, decay, config.ema_ramp) for name, decay in decays(config).items()}
    return TrainState(model, averages, optimizer)


def open_for(config: TrainConfig, card: ModelCard, latents: LatentManifest, ranks: Ranks) -> Data:
    """The images of a store on the model's scale, as the config says how to read and to check them.

    Errors as `open_data`.
    """
    start = ranks.agreed(uuid4().hex) if config.verify == "every_start" else None
    return open_data(latents, card.channels, streamed=config.reading == "streamed", start=start)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of the step with that number."""
    images = config.warmup_images
    warmup = config.warmup_steps if images is None else images / config.batch_size
    if step + 1 <= warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = max(0, step - warmup) / (config.steps - warmup)
    left = {"none": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[config.decay]
    return config.learning_rate * (config.decay_to + (1 - config.decay_to) * left)


def step_config(config: TrainConfig) -> StepConfig:
    """How the steps of a run are taken."""
    return StepConfig(
        learning_rate=lambda step: learning_rate(config, step),
        gradient_clip=config.gradient_clip,
        autocast=autocast(config),
        micro_batch=config.micro_batch,
        dispersive=config.dispersive,
    )


def autocast(config: TrainConfig) -> torch.dtype | None:
    """The lower precision of the forward pass; None computes in that of the weights."""
    lower = dtype(config.precision)
    return None if lower == torch.float32 else lower
