"""A checkpoint to images: guided samples, decoded, in a store that resumes block by block."""

# B = batch, C = latent channels, h = latent side, H = image side

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from math import gcd
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit.devices import arithmetic, device, dtype
from dit.diffusion.config import EDMConfig, FlowConfig
from dit.diffusion.edm import EDM
from dit.export import CheckpointManifest, ModelCard, Trained, load, weights_file
from dit.latent_scale import LatentScale
from dit.models.config import ModelConfig
from dit.models.cost import cost
from dit.pixels import to_bytes
from dit.ranks import Ranks, Share, joined
from dit.rates import at_once, decoder_rate, forward_rate
from dit.samplers import guide
from dit.samplers.config import SampleConfig
from dit.samplers.guidance import UNGUIDED, Guided
from dit.samplers.labels import class_label, described, sample_labels
from dit.samplers.noise import SampleNoise
from dit.samplers.state import end
from dit.samplers.table import sampler, unused_fields
from dit.vae import Vae, load_vae, vae_inputs
from storage.errors import DitflowError, InputError
from storage.estimate import PlanContext, StageCost, store_objects
from storage.images.grid import image_grid
from storage.manifest import Manifest, StageOutput
from storage.rows.store import ArraySpec, RowLayout, RowWriter, gathered
from storage.stage import StageDefinition
from storage.tracker import Tracker, publish

VERSION = 3
PICTURE = "samples.png"
TIMEOUT = timedelta(days=7)
"""How long ranks wait for one another: a block can take hours."""


class SampleManifest(Manifest):
    """Generated images uint8 (H, H, 3) and their labels, -1 where there are none, in a row store."""

    STAGE = "sample"

    resolution: int
    """Side of the images, in pixels."""
    class_names: tuple[str, ...]
    """Names of the classes; a label is an index into them."""
    conditions: dict[str, str | int | float]
    """How the samples were drawn: publish it with every number computed from them."""


LAST_BITS = ("compile", "batch_size", "decode_batch_size", "block_rows")
"""Fields that can change no more than the last bits."""


def run(config: SampleConfig, checkpoint: CheckpointManifest, *, out: StageOutput, tracker: Tracker) -> SampleManifest:
    """Draw the missing blocks of samples, each on one of the ranks, and commit them.

    Raises:
        InputError: decoder, guide, sampler, steps or weights do not fit the model, or a file is missing or damaged.
        StorageError: the disk is full.
        DitflowError: the model's samples are not finite.
    """
    with joined(TIMEOUT) as ranks:
        vae = open_decoder(config, checkpoint.card)
        trained = load(checkpoint.uri, weights=_weights(config, checkpoint.card), device=device())
        trained = guide.with_guide(config, trained, device())
        work = _Work(config, compiled(config, trained), vae)
        resolution = trained.card.resolution
        rows = layout(config.count, config.block_rows, resolution, nfe=_adaptive(config, trained.card))
        writer = RowWriter(out, rows, {"range": [0, 255]})
        _draw(work, writer, ranks, out, tracker)
        ranks.finish()
        if ranks.first:
            _commit(work, writer, out)
        ranks.wait()
        return SampleManifest.read(out.uri)


@dataclass(frozen=True)
class _Work:
    """What is the same for all blocks."""

    config: SampleConfig
    trained: Trained
    vae: Vae | None


def _draw(work: _Work, writer: RowWriter, ranks: Ranks, out: StageOutput, tracker: Tracker) -> None:
    """Draw this rank's share of the missing blocks."""
    missing = ranks.agreed(writer.missing())  # listed once, since blocks that fast ranks write are missing no longer
    mine = missing[ranks.rank :: ranks.world_size]
    todo, total = (sum(_rows(writer, block) for block in blocks) for blocks in (missing, mine))
    share, done = Share(tracker, work.config.count - todo, todo), 0
    for block in mine:
        parts = generate(work.config, work.trained, work.vae, *writer.bounds(block))
        rows = gathered(parts, share, start=done, total=total, unit="images")
        if block == 0:  # before the block is committed, so a resumed run has the picture
            publish(out, tracker, PICTURE, picture(rows["image"], work.trained.card))
        writer.write(block, rows)
        done += _rows(writer, block)


def _rows(writer: RowWriter, block: int) -> int:
    start, stop = writer.bounds(block)
    return stop - start


def _commit(work: _Work, writer: RowWriter, out: StageOutput) -> None:
    card = work.trained.card
    files = writer.finish()
    out.commit(
        SampleManifest,
        [*files, out.describe(f"artifacts/{PICTURE}")],
        counts={"images": work.config.count},
        resolution=card.resolution,
        class_names=card.class_names,
        conditions=_conditions(work.config, card, work.vae) | _nfe(work, writer),
    )


def compiled(config: SampleConfig, trained: Trained) -> Trained:
    """The model and its guide, compiled if the config says so. Each batch size is compiled when it is first used."""
    for each in (trained, trained.guide):
        if config.compile and each is not None:
            each.model.compile(dynamic=False)
    return trained


def generate(
    config: SampleConfig, trained: Trained, vae: Vae | None, start: int, stop: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """Samples ``start`` to ``stop``, a batch at a time: image uint8 (B, H, H, 3) and label int32 (B,).

    Where samples differ in them, also ``nfe`` int32 (B,): passes of the network, guided or not.
    """
    for first in range(start, stop, config.batch_size):
        indices = range(first, min(first + config.batch_size, stop))
        labels = _labels(config, indices, trained.card)
        rows = _drawn(config, trained, vae, indices, labels)
        yield rows | {"label": labels.numpy().astype(np.int32)}


def draw(
    config: SampleConfig, trained: Trained, vae: Vae | None, indices: range, labels: torch.Tensor
) -> NDArray[np.uint8]:
    """The images uint8 (B, H, H, 3) of the samples with these indices and labels (B,).

    Args:
        config: how to draw them; count and labels in it are not used.
        trained: the model.
        vae: the decoder, which unscales latents as the model's card says; None for a model on pixels.
        indices: indices of the samples in the whole set; the noise of each depends only on the seed and its index.
        labels: a class for each; not used if the model is unconditional.

    Raises:
        InputError: the process has no such number of steps.
        DitflowError: the samples are not finite.
    """
    return _drawn(config, trained, vae, indices, labels)["image"]


def _drawn(
    config: SampleConfig, trained: Trained, vae: Vae | None, indices: range, labels: torch.Tensor
) -> dict[str, NDArray[Any]]:
    card, model = trained.card, trained.card.model
    noise = SampleNoise(config.seed, indices, (model.in_channels, model.input_size, model.input_size), device())
    y = labels.to(device()) if model.num_classes else None
    with arithmetic(config.precision):
        with torch.autocast(device().type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            states = sampler(config, card.diffusion).states
            final = end(states(config, card.diffusion, _guided(config, trained), y, noise))
        if not final.x.isfinite().all():
            which = f"samples {indices[0]:,} to {indices[-1]:,}"
            raise DitflowError(f"{which} are not finite; check the model's training loss")
        rows = {"image": decoded(config, card, vae, final.x).numpy()}
    return rows if final.passes is None else rows | {"nfe": final.passes.cpu().numpy().astype(np.int32)}


def decoded(config: SampleConfig, card: ModelCard, vae: Vae | None, x0: torch.Tensor) -> torch.Tensor:
    """The images uint8 (B, H, H, 3) of latents or pixels (B, C, h, h), on the CPU."""
    if vae is None or card.vae is None:
        return to_bytes(x0, config.rounding).cpu()
    scale = LatentScale.of(card.vae, card.channels)
    return torch.cat([vae.decode(part, config.rounding, scale).cpu() for part in x0.split(config.decode_batch_size)])


def _guided(config: SampleConfig, trained: Trained) -> Guided:
    card, interval, other = trained.card, config.guidance_interval, trained.guide
    if interval and isinstance(card.diffusion, EDMConfig):
        interval = (EDM.network_time(interval[0]), EDM.network_time(interval[1]))
    return Guided(
        trained.model,
        _scale(config, card.model),
        card.model.num_classes,
        config.guidance_channels,
        config.guidance_schedule,
        interval,
        isinstance(card.diffusion, FlowConfig),
        other.model if other else None,
    )


def _scale(config: SampleConfig, model: ModelConfig) -> float:
    """The guidance scale; `UNGUIDED` for a model without classes that no other model guides."""
    return config.guidance_scale if model.num_classes or config.guide else UNGUIDED


def layout(count: int, block_rows: int, resolution: int, *, nfe: bool = False) -> RowLayout:
    """A row store of labelled images, with the passes of the network for each if ``nfe``."""
    chunk = gcd(block_rows, 2**20 // resolution**2 or 1)  # at most 3 MiB
    image = ArraySpec("image", "uint8", (resolution, resolution, 3), chunk)
    numbers = (ArraySpec(name, "int32", (), block_rows) for name in ("label", *["nfe"] * nfe))
    return RowLayout(count, block_rows, (image, *numbers))


def _adaptive(config: SampleConfig, card: ModelCard) -> bool:
    return sampler(config, card.diffusion).adaptive


def _labels(config: SampleConfig, indices: range, card: ModelCard) -> torch.Tensor:
    if card.model.num_classes == 0:
        return torch.full((len(indices),), -1)
    return sample_labels(config.labels, indices, config.seed, card.class_names)


def open_decoder(config: SampleConfig, card: ModelCard, on: torch.device | str | None = None) -> Vae | None:
    """Load the decoder of a model's latents; None for a model on pixels.

    Args:
        config: how to sample.
        card: of the model.
        on: device of the decoder; None for the one that samples are drawn on.

    Raises:
        InputError: sampler or decoder do not fit the model, or the decoder cannot be loaded.
    """
    check_process(config, card)
    ref = config.vae or card.vae_ref
    if ref is None:
        return None
    vae = load_vae(ref, on or device(), dtype(config.precision))
    _check_decoder(vae, card)
    return vae


def check_process(config: SampleConfig, card: ModelCard) -> None:
    """Check that sampler, steps, guidance and labels fit the model.

    Raises:
        InputError: they do not fit.
    """
    row = sampler(config, card.diffusion)
    if _scale(config, card.model) != UNGUIDED and not card.model.label_dropout and not config.guide:
        reason = "without label dropout in training, the model has no null label to guide with"
        raise InputError(f"sample.guidance_scale: {reason}; use 1, or name a worse model in sample.guide")
    interval = config.guidance_interval
    if interval and interval[0] > interval[1]:
        raise InputError(f"sample.guidance_interval: {list(interval)} is empty; write the lowest first")
    if isinstance(card.diffusion, EDMConfig) and config.guidance_schedule == "power_cosine":
        reason = "power_cosine needs timesteps or a flow's times, which EDM has not"
        raise InputError(f"sample.guidance_schedule: {reason}; use constant")
    _check_labels(config, card)
    row.check(config, card.diffusion)


def _check_labels(config: SampleConfig, card: ModelCard) -> None:
    if isinstance(config.labels, str):
        return
    if not card.model.num_classes:
        raise InputError("sample.labels: the model is unconditional, it has no classes to choose from; leave them out")
    for name in config.labels:
        try:
            class_label(name, card.class_names)
        except InputError as error:
            raise InputError(f"sample.labels: {error}") from error


def check(config: SampleConfig, checkpoint: CheckpointManifest, _: PlanContext) -> None:
    """Check that the samples can be drawn from a model that may not be trained yet.

    Raises:
        InputError: as `run`, unless the checkpoint is damaged.
    """
    _weights(config, checkpoint.card)
    guide.guide_of(config, checkpoint.card)
    open_decoder(config, checkpoint.card, "cpu")


def _weights(config: SampleConfig, card: ModelCard) -> str:
    """File of the weights to sample from."""
    file = weights_file(config.weights)
    if file not in card.weights:
        others = "train.ema_decays and train.ema_power add averages"
        others = others if card.ema_std is None else "it is an average itself, whose name is ema"
        hint = f"it has {', '.join(sorted(card.weights))}; {others}"
        raise InputError(f"sample.weights: the model has no {file} for {config.weights}; {hint}")
    return file


def _check_decoder(vae: Vae, card: ModelCard) -> None:
    """Check that the decoder fits the model."""
    if card.vae is None:
        raise InputError("sample.vae: the model works on pixels and needs no decoder; remove it")
    hint = "use the autoencoder that made the latents, or another decoder of the same latents"
    if vae.channels != card.model.in_channels:
        channels = f"the autoencoder has {vae.channels} latent channels, the model {card.model.in_channels}"
        raise InputError(f"sample.vae: {channels}; {hint}")
    side = card.model.input_size * vae.downsample
    if side != card.resolution or vae.kind.side not in (None, side):
        side = vae.kind.side or side
        raise InputError(f"sample.vae: the autoencoder makes images of {side} px, not of {card.resolution}; {hint}")


def _conditions(config: SampleConfig, card: ModelCard, vae: Vae | None) -> dict[str, str | int | float]:
    """What the images depend on: the fields of the config that were used, the decoder and the training steps."""
    unused = set(unused_fields(config, card.diffusion))
    scale = _scale(config, card.model)
    if scale == UNGUIDED:
        unused |= {name for name in SampleConfig.model_fields if name.startswith("guidance_")}
    conditions: dict[str, Any] = config.model_dump(exclude={"vae", "guide", "guide_weights", *LAST_BITS, *unused})
    conditions |= {"guidance_scale": scale, "labels": described(config.labels)} | guide.conditions(config, card)
    interval = conditions.pop("guidance_interval", None)
    if interval:
        conditions["guidance_interval"] = f"{interval[0]:g} to {interval[1]:g}"
    if card.model.num_classes == 0:
        conditions["labels"] = "none"
    if vae:
        conditions["decoder_sha256"] = vae.sha256
    if card.ema_std is not None:
        conditions["ema_std"] = card.ema_std
    return conditions | {"training_steps": card.steps}


def _nfe(work: _Work, writer: RowWriter) -> dict[str, float]:
    """Passes of the network for an image, guided or not, in the mean.

    Samples of other processes have none: in outputs of earlier versions there is no such condition.
    """
    config, card = work.config, work.trained.card
    if not isinstance(card.diffusion, FlowConfig):
        return {}
    if _adaptive(config, card):
        return {"nfe": round(float(writer.array("nfe").mean()), 2)}
    return {"nfe": sampler(config, card.diffusion).passes(config.steps)}


def picture(images: NDArray[np.uint8], card: ModelCard) -> bytes:
    """A PNG of the first images in eight rows. With up to 16 classes, balanced labels put one class in each column."""
    columns = len(card.class_names) if card.model.num_classes and len(card.class_names) <= 16 else 8
    return image_grid(images[: 8 * columns], columns=columns, gap=2)


def estimate(config: SampleConfig, checkpoint: CheckpointManifest, plan: PlanContext) -> StageCost:
    """What it takes to draw the samples."""
    card, ref = checkpoint.card, config.vae or checkpoint.card.vae_ref
    passes, adaptive = sampler(config, card.diffusion).passes(config.steps), _adaptive(config, card)
    macs = cost(card.model).macs
    if _scale(config, card.model) != UNGUIDED:  # the second pass is within the interval alone, if there is one
        worse = guide.guide_of(config, card)
        macs += cost(worse.card.model).macs if worse else macs
    rate = plan.rate("sample", lambda: forward_rate(card.model, config.batch_size, config.precision))
    seconds = config.count * passes * 2 * macs / rate
    if ref:
        seconds += config.count / plan.rate(
            "decode", lambda: decoder_rate(ref, card.resolution, config.precision, config.decode_batch_size)
        )
    rows = layout(config.count, config.block_rows, card.resolution, nfe=adaptive)
    facts = {"resolution": card.resolution, "class_names": card.class_names, "conditions": {}}
    return StageCost(
        images=config.count,
        objects=store_objects(rows),
        size=rows.size,
        units=rows.blocks,
        done=plan.records(),
        seconds=seconds / at_once(plan.world_size),
        leaves={"counts": {"images": config.count}, **facts},
        guess=f"{config.sampler} with {passes} passes for an image, which is a guess" if adaptive else "",
    )


DEFINITION = StageDefinition(
    SampleConfig,
    SampleManifest,
    VERSION,
    run,
    lambda config, checkpoint: vae_inputs(config.vae or checkpoint.card.vae_ref),
    estimate,
    {
        "sample": "FLOP of the model's forward passes in a second, on one rank",
        "decode": "latents decoded to images in a second, on one rank",
    },
    check,
    lambda config, _: guide.parents(config),
)
