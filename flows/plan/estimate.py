"""What a recipe will cost, before anything runs: images, bytes, objects, hours, memory, and what is there already."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch
import yaml
from pydantic import ValidationError

from dit import rates as measured
from dit.devices import device, dtype
from dit.diffusion.config import DiffusionConfig
from dit.metrics.measure import KEPT_REFERENCE
from dit.models.choice import Given
from dit.models.config import ModelConfig
from dit.models.cost import Cost, activations, cost
from dit.rates import Rates
from dit.sample import layout as sample_layout
from dit.training.layers import recompute_blocks
from dit.vae import info
from flows.contract import STAGES, Source
from flows.launch.spec import LocalLaunch
from flows.plan.table import Copy, Line, Plan
from flows.recipe import Recipe
from storage import records, uri
from storage.archives.open import Archive, open_archive
from storage.config import problem
from storage.errors import InputError
from storage.latents import VaeInfo, latent_layout, pixel_layout
from storage.manifest import Manifest, StageOutput
from storage.rows import cache
from storage.rows.format import stored_arrays
from storage.rows.staging import to_copy
from storage.rows.store import RowLayout
from storage.shards.runners import here

HOUR = 3600.0
TAR_BLOCK = 512
TAR_MEMBERS = 3  # headers of an image and of its label, and the label itself


@dataclass(frozen=True)
class Work:
    """What a stage has to do and what it leaves behind."""

    images: int
    objects: int
    """Objects written, commit records and manifest among them."""
    size: int
    """Bytes that they have."""
    units: int
    """Units that commit themselves."""
    seconds: float
    """For all of it, on the machine of the rates."""


def plan(recipe: Recipe, root: str, rates: Rates) -> Plan:
    """Reckon what a recipe costs, listing its archive and measuring the rates that are not given.

    Raises:
        InputError: the archive, the autoencoder, the model or the extractor cannot be used as the recipe says.
        StorageError: a store does not answer.
    """
    known = _Known(recipe, root, rates)
    lines = tuple(known.lines())
    missing, there = sum(line.missing for line in lines), _free(root)
    memory, memory_there, copy = known.memory(), _memory(), known.copy()
    return Plan(
        recipe=recipe.name,
        lines=lines,
        rates=known.rates,
        memory=memory,
        memory_there=memory_there,
        disk=missing,
        disk_there=there,
        copy=copy,
        problems=(*_problems(recipe, root, missing, there, memory, memory_there), *_no_room(copy)),
    )


def read_rates(path: str | None) -> Rates:
    """The rates of a YAML file; none without one.

    Raises:
        InputError: it cannot be read or holds something else.
    """
    if path is None:
        return Rates()
    try:
        return Rates.model_validate(yaml.safe_load(Path(path).read_text("utf-8")) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--rates {path}: cannot be read ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        raise InputError(f"--rates {path}: {problem(error)}") from error


class _Known:
    """What the recipe, its archive and the rates say about each stage."""

    def __init__(self, recipe: Recipe, root: str, rates: Rates) -> None:
        self.recipe, self.root = recipe, root
        archive = recipe.archive
        self.train = open_archive(archive.train)
        self.held_out: Archive | None = None
        if archive.held_out is not None:
            self.held_out = open_archive(archive.held_out, self.train.class_names, archive.held_out_labels)
        self.vae: VaeInfo | None = info(recipe.encode.vae) if recipe.encode.vae else None
        self.rates, self.mean_size = self._measured(rates)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, h) of what the model is trained on."""
        if self.vae is None:
            return 3, self.recipe.encode.resolution, self.recipe.encode.resolution
        side = self.recipe.encode.resolution // self.vae.downsample
        return self.vae.channels, side, side

    @cached_property
    def model(self) -> ModelConfig:
        """The model that will be trained."""
        train, (channels, side, _) = self.recipe.train, self.shape
        learns = isinstance(train.diffusion, DiffusionConfig)
        try:
            given = Given(channels, side, len(self.train.class_names), learns, train.augmentation > 0)
            return train.model.config(given)
        except ValidationError as error:
            raise InputError(f"train.model: does not fit the latents: {problem(error)}") from error

    @cached_property
    def cost(self) -> Cost:
        """Of that model."""
        return cost(self.model)

    @property
    def local_batch(self) -> int:
        """Images that a rank takes through the model at once."""
        share = -(-self.recipe.train.batch_size // self.recipe.launch.world_size)
        return min(share, self.recipe.train.micro_batch or share)

    @property
    def ranks(self) -> int:
        """Ranks that work at the same time: on a CPU they share its cores."""
        return self.recipe.launch.world_size if device().type == "cuda" else 1

    def memory(self) -> int:
        """Bytes that training holds on a rank."""
        train = self.recipe.train
        lower, prepare = dtype(train.precision), recompute_blocks if train.checkpoint_activations else None
        kept = activations(self.model, self.local_batch, None if lower == torch.float32 else lower, prepare)
        return sum(self._held.values()) // self._shards + kept

    @property
    def _held(self) -> dict[str, int]:
        """Bytes that training holds in all, by what they are."""
        held = self.cost.memory
        return held | {"ema": (1 + len(self.recipe.train.ema_decays)) * held["ema"]}

    @property
    def _shards(self) -> int:
        """Ranks among which training deals what it holds."""
        parallel, launch = self.recipe.train.parallel, self.recipe.launch
        machines = launch.nodes if parallel == "hsdp" and not isinstance(launch, LocalLaunch) else 1
        return 1 if parallel == "ddp" else launch.world_size // machines

    def lines(self) -> list[Line]:
        """The stages in their order."""
        found = []
        for name in self.recipe.stages:
            if name == "register":
                break
            work: Work = getattr(self, f"_{name}")()
            output, made = self._outputs.get(name, (None, None))
            done = work.units if made else self._done(name, output) if output else 0
            found.append(_line(name, work, min(done, work.units)))
        return found

    def copy(self) -> Copy | None:
        """What training copies to the cache of this machine."""
        _, trained = self._outputs.get("train", (None, None))
        if trained or self.recipe.train.reading == "streamed" or uri.local_path(self.root) is not None:
            return None
        _, latents = self._outputs.get("encode", (None, None))
        size = to_copy(latents, stored_arrays(latents)[1]) if latents else self._layout.data_bytes
        return Copy(str(cache.root()), size, _room(cache.root()))

    @cached_property
    def _outputs(self) -> dict[str, tuple[StageOutput, Manifest | None]]:
        """Of each stage whose source is there: its output, and the manifest if it is committed."""
        source: Source | None = self.recipe.archive
        found = dict[str, tuple[StageOutput, Manifest | None]]()
        for name in self.recipe.stages:
            if source is None or name == "register":
                break
            stage = STAGES[name]
            output = stage.output(self.root, self.recipe.config_of(name), source)
            source = output.committed(stage.kind)
            found[name] = output, source
        return found

    def _done(self, name: str, output: StageOutput) -> int:
        """How many units of an unfinished stage are there."""
        if name != "train":
            return sum(name.endswith(".json") for name in uri.names(output.url(records.FOLDER)))
        newest = max(uri.names(output.url("checkpoints")), default="step-0")
        return int(newest.rpartition("-")[2])

    def _shard(self) -> Work:
        counts, size = [], 0
        for archive in filter(None, (self.train, self.held_out)):
            counts.append(len(archive.members))
            blocks = (-(-(member.size or round(self.mean_size)) // TAR_BLOCK) for member in archive.members)
            size += TAR_BLOCK * (sum(blocks) + TAR_MEMBERS * len(archive.members))
        shards = sum(-(-count // self.recipe.shard.images_per_shard) for count in counts)
        return Work(sum(counts), 2 * shards + 2, size, shards, sum(counts) / _known(self.rates.shard))

    def _encode(self) -> Work:
        count, flips = self._rows, 2 if self.recipe.encode.flips else 1
        if self.vae is None:
            return _stored(count, self._layout, count / _known(self.rates.shard))
        return _stored(count, self._layout, count * flips / _known(self.rates.encode) / self.ranks)

    @property
    def _layout(self) -> RowLayout:
        """Of the latents, or of the pixels."""
        config = self.recipe.encode
        if self.vae is None:
            return pixel_layout(self._rows, config.resolution, config.block_rows, config.chunk_rows)
        flips = 2 if config.flips else 1
        return latent_layout(self._rows, flips, self.shape, config.block_rows, config.chunk_rows)

    def _train(self) -> Work:
        config, held = self.recipe.train, self._held
        checkpoint = held["weights"] + held["adamw"] + held["ema"]
        size = config.keep_checkpoints * checkpoint + held["weights"] + held["ema"]
        images = config.steps * config.batch_size
        seconds = images * self.cost.training_flops / _known(self.rates.train) / self.ranks
        return Work(images, 2 * config.keep_checkpoints + 5, size, config.steps, seconds)

    def _sample(self) -> Work:
        config = self.recipe.sample
        passes = config.steps * (2 if config.sampler == "heun" else 1)
        if config.guidance_scale != 1 and self.model.num_classes:
            passes *= 2  # within the interval alone, if there is one
        seconds = config.count * passes * 2 * self.cost.macs / _known(self.rates.sample)
        seconds += config.count / self.rates.decode if self.rates.decode else 0.0
        rows = sample_layout(config.count, config.block_rows, self.recipe.encode.resolution)
        return _stored(config.count, rows, seconds / self.ranks)

    def _evaluate(self) -> Work:
        count, reference = self.recipe.sample.count, self._rows
        images = reference + 2 * count + min(count, len(self.held_out.members) if self.held_out else 0)
        seconds = images / _known(self.rates.evaluate) / self.ranks
        return Work(min(reference, KEPT_REFERENCE) + count, 2, 10_000, 1, seconds)

    @property
    def _rows(self) -> int:
        """Images that are encoded."""
        split = {"train": self.train, "held_out": self.held_out}.get(self.recipe.encode.split)
        if split is None:
            raise InputError(f"encode.split: {self.recipe.encode.split!r} is not in the archive")
        return len(split.members)

    def _measured(self, given: Rates) -> tuple[Rates, float]:
        """The rates, those that are not given measured, and the mean size of an image file."""
        recipe, values = self.recipe, given.model_dump()
        shard, mean_size = measured.shard_rate(self.train, here(recipe.shard.runner))
        values["shard"] = given.shard or shard
        config = recipe.encode
        if config.vae and not (given.encode and given.decode):
            encode, decode = measured.autoencoder_rates(config.vae, config.resolution, config.precision)
            values |= {"encode": given.encode or encode, "decode": given.decode or decode}
        if not (given.train and given.sample):
            train, sample = measured.model_rates(self.model, self.local_batch, recipe.train.precision)
            values |= {"train": given.train or train, "sample": given.sample or sample}
        if recipe.evaluate and not given.evaluate:
            values["evaluate"] = measured.extractor_rate(recipe.evaluate.extractor, config.resolution)
        return Rates(**values), mean_size


def _known(rate: float | None) -> float:
    assert rate is not None  # given or measured
    return rate


def _stored(images: int, rows: RowLayout, seconds: float) -> Work:
    """The work of a stage that fills a row store."""
    objects = rows.objects + rows.blocks + len(rows.arrays) + 3  # records; metadata; group, picture, manifest
    return Work(images, objects, rows.size, rows.blocks, seconds)


def _line(name: str, work: Work, done: int) -> Line:
    left = 1 - done / work.units
    unit = "steps" if name == "train" else "units"
    state = "done" if not left else f"{done:,} of {work.units:,} {unit}" if done else "to do"
    return Line(name, state, work.images, work.objects, work.size, round(work.size * left), left * work.seconds / HOUR)


def _free(root: str) -> int | None:
    path = uri.local_path(root)
    return None if path is None else _room(path)


def _room(path: Path) -> int:
    """Bytes that are free where a folder lies or will lie."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _memory() -> int:
    if device().type == "cuda":
        return int(torch.cuda.get_device_properties(device()).total_memory)
    return int(psutil.virtual_memory().total)


def _problems(
    recipe: Recipe, root: str, disk: int, disk_there: int | None, memory: int, memory_there: int
) -> list[str]:
    """What does not fit, and what to change."""
    found = []
    if disk_there is not None and disk > disk_there:
        change = "name a larger --root" + (", or encode.flips=false, half the latents" if recipe.encode.flips else "")
        found.append(f"{root}: {disk / 1e9:,.1f} GB to write, {disk_there / 1e9:,.1f} GB are free; {change}")
    ranks = recipe.launch.world_size
    together = 1 if device().type == "cuda" else ranks
    if memory * together > memory_there:
        need = f"{memory / 2**30:,.1f} GiB on each of {ranks} ranks"
        change = "train.micro_batch, train.checkpoint_activations, train.parallel=fsdp or more ranks (launch)"
        found.append(f"train: needs {need}, and there are {memory_there / 2**30:,.1f} GiB; {change}")
    if recipe.train.batch_size % recipe.launch.world_size:
        found.append(
            f"train.batch_size: {recipe.train.batch_size} does not divide among {recipe.launch.world_size} ranks"
        )
    return found


def _no_room(copy: Copy | None) -> list[str]:
    """Why the cache cannot hold the latents, and what to change."""
    if copy is None or copy.size <= copy.there:
        return []
    need = f"{copy.size / 1e9:,.1f} GB of latents to copy here for training, {copy.there / 1e9:,.1f} GB are free"
    change = "set XDG_CACHE_HOME to a folder on a larger disk, or train.order=pooled with train.reading=streamed"
    return [f"{copy.folder}: {need}; {change}"]
