"""The loss on images that the model is not trained on, always at the same noise levels and with the same noise.

The levels are the middles of the quarters of u in [0, 1), which a process makes its times from (`Process.sample_t`).
At each level an image has noise, and a sample of the autoencoder's posterior, that depend on the number of the image
and on the level alone. So measurements of several steps, of the average and of the weights themselves, and of runs with
other seeds, differ by the weights and by nothing else. Labels are not dropped, and images not mirrored or distorted.

Images are the independent units: an image's loss is the mean over its levels, and the standard error is that of the
mean over images. It says how far other images would move the number. Two numbers of the same images are far closer.
"""

# N = held-out images that are measured, B = images of a pass, L = levels

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from shlex import quote
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import nn

from dit.devices import Arithmetic, device, sent
from dit.diffusion.build import build_process
from dit.diffusion.process import Process
from dit.encode import EncodeConfig, held_out_config
from dit.export import ModelCard
from dit.ranks import Ranks
from dit.training.config import HeldOutLoss, TrainConfig
from dit.training.data import Batch, Data
from dit.training.draws import StepDraws
from dit.training.loop import StepConfig, TrainState, loss_terms
from dit.training.parallelize import is_fsdp
from dit.training.prefetch import prefetched
from dit.training.start import open_for, step_config
from dit.training.throughput import LoggedStep
from storage import uri
from storage.archives.open import HELD_OUT
from storage.channels import ChannelScale
from storage.config import problem
from storage.errors import InputError
from storage.estimate import PlanContext
from storage.header import short_digest
from storage.latents import LatentManifest, bytes_to_stage
from storage.manifest import StageOutput
from storage.seal import json_digest
from storage.shards.shard import ShardManifest

LEVELS = (0.125, 0.375, 0.625, 0.875)
"""u of each level."""
SEED = 0
NEVER = 2**63
"""The random numbers are those of steps from this one on, which no run takes."""
LOSS, RAW_LOSS = "held_out_loss", "held_out_loss_raw"
"""Metrics of the average ``ema``, and of the weights themselves."""
REPORT = f"{LOSS}.json"
"""Artifact of a checkpoint with all measurements."""


def held_out_latents(latents: LatentManifest) -> LatentManifest:
    """The held-out images of the data set whose training images are given, below the same root.

    Raises:
        InputError: they are not encoded, or were encoded from other tars; or they are what the model is trained on.
    """
    check_held_out(latents)
    try:
        config = held_out_config(EncodeConfig.model_validate(latents.config))
    except ValidationError as error:
        where = uri.redact(latents.uri)
        raise InputError(f"train.held_out: {where} has another config than encode ({problem(error)})") from error
    place = StageOutput(uri=latents.uri, header=latents).with_config(config)
    found = place.committed(LatentManifest)
    if found is None:
        sets = f"--set train.held_out=null --set encode.split={HELD_OUT} --set encode.flips=false"
        tars, root = uri.redact(latents.parent("shards", ShardManifest).url), uri.redact(place.root)
        make = f"run the whole recipe, or `ditflow encode RECIPE --from {quote(tars)} {sets} --root {quote(root)}`"
        raise InputError(f"train.held_out: no latents of held-out images in {uri.redact(place.uri)}; {make}")
    return found


def check_held_out(latents: LatentManifest) -> None:
    """Check that the images that a model is to be trained on are others than those that its loss is measured on.

    Raises:
        InputError: they are the same.
    """
    if latents.split == HELD_OUT:
        raise InputError("train.held_out: the model is trained on the held-out images; encode the split train, or null")


def passes(config: TrainConfig, plan: PlanContext) -> int:
    """Images that pass forward through the model for all measurements of a run that is planned."""
    if config.held_out is None:
        return 0
    measurements = -(-config.steps // config.held_out.every)
    return measurements * min(config.held_out.images, _available(plan)) * len(LEVELS) * 2


def bytes_to_copy(config: TrainConfig, latents: LatentManifest, plan: PlanContext) -> int | None:
    """Bytes that a run still has to copy to this machine: latents to train on, and all of the held-out images."""
    size = bytes_to_stage(latents)
    if size is None or config.held_out is None:
        return size
    held_out = latents.model_copy(update={"files": (), "counts": {"images": _available(plan)}, "flips": 1})
    return size + (bytes_to_stage(held_out) or 0)


def _available(plan: PlanContext) -> int:
    return plan.manifest(ShardManifest).splits[HELD_OUT].count


def open_held_out(config: TrainConfig, card: ModelCard, latents: LatentManifest, ranks: Ranks) -> "HeldOut | None":
    """What measures a run's loss on held-out images, if its config asks for that.

    Raises:
        InputError: as `held_out_latents`.
        StorageError: as `open_data`.
    """
    if config.held_out is None:
        return None
    held_out = held_out_latents(latents)
    return HeldOut(
        config=config.held_out,
        latents=held_out,
        data=open_for(config, card, held_out, ranks),
        process=build_process(config.diffusion, device()),
        step_config=step_config(config),
        precision=config.precision,
        ranks=ranks,
        device=device(),
        labelled=card.model.num_classes > 0,
        channels=card.channels,
        compiled=config.compile,
    )


@dataclass(frozen=True)
class HeldOut:
    """Measures the loss on held-out images, whose passes the ranks share.

    A pass is a batch of images at one level. Its images do not depend on the number of ranks, so neither do the
    numbers. The batches are made anew for each measurement, in the background, so none of them stays in the memory.
    """

    config: HeldOutLoss
    latents: LatentManifest
    """Manifest of the held-out images."""
    data: Data
    """The held-out images."""
    process: Process
    step_config: StepConfig
    precision: Arithmetic
    ranks: Ranks
    device: torch.device
    labelled: bool
    """Whether the model has classes."""
    compiled: bool = False
    """Whether the model is compiled. It is measured without the compiled code, whose graphs are for training."""
    channels: ChannelScale | None = None
    """Statistics of the training latents, which these are normalised by as well."""

    @property
    def count(self) -> int:
        """N."""
        return min(self.config.images, self.latents.count)

    @property
    def conditions(self) -> dict[str, Any]:
        """What the numbers depend on beside the weights."""
        normalised = {"channels": self.channels.model_dump(mode="json")} if self.channels else {}
        return normalised | {
            "latents": self.latents.digest,
            "content": self.latents.content,
            "images": self.count,
            "batch_size": self.config.batch_size,
            "levels": LEVELS,
            "times": self.process.sample_t(torch.tensor(LEVELS, device=self.device)).tolist(),
            "noise_seed": SEED,
            "precision": self.precision,
        }

    @cached_property
    def conditions_digest(self) -> str:
        """Digest of the conditions, 16 digits."""
        return short_digest(json_digest(self.conditions))

    def due(self, step: int, last: int) -> bool:
        """Whether to measure after a step; it is done after the last one, too."""
        return step % self.config.every == 0 or step == last

    @torch.no_grad()
    def measure(self, state: TrainState) -> dict[str, float]:
        """The losses with their standard errors, on the first rank; nothing on the others. All ranks must call this.

        The state is afterwards what it was, to the bit. A number that is not finite is left out.
        """
        found: dict[str, float] = {}
        with self._evaluating(state.model):
            with state.averages["ema"].exchanged(state.model):
                averaged = self._losses(state.model)
            raw = self._losses(state.model)
        for name, losses in ((LOSS, averaged), (RAW_LOSS, raw)):
            if losses is not None:
                found |= summary(name, losses)
        return {name: value for name, value in found.items() if np.isfinite(value)}

    def points(self, history: Sequence[LoggedStep]) -> list[LoggedStep]:
        """The steps that were measured under these conditions."""
        return [logged for logged in history if logged.held_out and logged.conditions == self.conditions_digest]

    def series(self, history: Sequence[LoggedStep]) -> dict[str, list[tuple[int, float, float]]]:
        """Step, loss and standard error of all measurements, by the name of the weights for people."""
        names, points = {"EMA": LOSS, "weights": RAW_LOSS}, self.points(history)
        return {
            name: [
                (each.step, each.held_out[key], each.held_out.get(f"{key}_se", 0.0))
                for each in points
                if key in each.held_out
            ]
            for name, key in names.items()
        }

    def report(self, history: Sequence[LoggedStep]) -> bytes:
        """Conditions and numbers of all measurements, as JSON."""
        points = [{"step": logged.step, **logged.held_out} for logged in self.points(history)]
        return json.dumps({"conditions": self.conditions, "points": points}, indent=1).encode()

    @cached_property
    def _parts(self) -> list[tuple[int, int]]:
        """The passes of this rank, each by its first image and its level.

        Every rank has as many, since a model whose parameters are sharded computes on all ranks at once; so some passes
        are done twice, with the same result.
        """
        parts = [
            (first, level) for first in range(0, self.count, self.config.batch_size) for level in range(len(LEVELS))
        ]
        rank, world = self.ranks.rank, self.ranks.world_size
        return [parts[number % len(parts)] for number in range(rank, -(-len(parts) // world) * world, world)]

    def _batch(self, number: int) -> Batch:
        """The batch of one of this rank's passes."""
        soon = np.concatenate([self._images(first) for first, _ in self._parts[number : number + 2]])
        self.data.expect(soon, np.zeros(len(soon), np.bool_))
        first, level = self._parts[number]
        items = self._images(first)
        draws = StepDraws(SEED, NEVER + level, items.tolist(), self.latents.latent_shape, self.device)
        x0 = self.data.x0(items, np.zeros(len(items), np.bool_), draws)
        u = torch.full((len(items),), LEVELS[level], dtype=torch.float64, device=self.device)
        labels = sent(self.data.labels[items], self.device).long() if self.labelled else None
        return Batch(x0, draws.noise, u, labels)

    def _images(self, first: int) -> NDArray[np.int64]:
        """The images of a pass by the first of them."""
        return np.arange(first, min(first + self.config.batch_size, self.count))

    @contextmanager
    def _evaluating(self, model: nn.Module) -> Iterator[None]:
        model.eval()
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            yield
        model.train()

    def _losses(self, model: nn.Module) -> NDArray[np.float64] | None:
        """Losses (N, L) on the first rank."""
        passes = range(len(self._parts))
        with prefetched(self._batch, passes) as batch:
            mine = [loss_terms(model, self.process, batch(each), self.step_config)["loss"].double() for each in passes]
        if is_fsdp(model):
            model.reshard()  # which the outermost module leaves to the backward pass
        shared = self.ranks.gathered(
            [(*part, losses.cpu().numpy()) for part, losses in zip(self._parts, mine, strict=True)]
        )
        if not self.ranks.first:
            return None
        table = np.empty((self.count, len(LEVELS)))
        for first, level, losses in (part for parts in shared for part in parts):
            table[first : first + len(losses), level] = losses
        return table


def summary(name: str, losses: NDArray[np.float64]) -> dict[str, float]:
    """The mean of losses (N, L) over images and levels, and of each level, with standard errors.

    Args:
        name: what the names of the numbers begin with.
        losses: of each image, at each level.
    """
    columns: Mapping[str, NDArray[np.float64]] = {name: losses.mean(1)} | {
        f"{name}_level_{number}": column for number, column in enumerate(losses.T, start=1)
    }
    errors = {f"{each}_se": _standard_error(column) for each, column in columns.items()}
    return {each: float(column.mean()) for each, column in columns.items()} | errors


def _standard_error(values: NDArray[np.float64]) -> float:
    """That of a mean; none of a single number."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
