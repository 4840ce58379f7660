"""Images to latents: mean and standard deviation of the autoencoder's posterior, of every image and its mirror image.

For models on pixels, images are cropped and stored instead.
"""

# B = batch, F = flips, H = image side, C = latent channels, h = latent side

import json
import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from dit.devices import Arithmetic, arithmetic, device, dtype
from dit.ranks import Ranks, Share, cores, joined
from dit.rates import at_once, beside, encoder_rate
from dit.vae import Vae, VaeRef, info, load_vae, vae_inputs
from storage import uri
from storage.archives.open import HELD_OUT
from storage.channels import PLANNED, commit_sums, statistics
from storage.config import Config, operational
from storage.errors import DitflowError, InputError, StorageError
from storage.estimate import PlanContext, StageCost, store_objects
from storage.header import FileEntry
from storage.images import transforms
from storage.images.grid import image_grid
from storage.latents import LatentManifest, VaeInfo, latent_layout, pixel_layout
from storage.manifest import StageOutput
from storage.parallel import ahead, threads
from storage.rows.store import RowLayout, RowWriter, gathered
from storage.seal import BrokenSealError, opened, sealed
from storage.shards.shard import Sample, ShardManifest, read_images
from storage.stage import StageDefinition
from storage.tracker import Tracker, publish

VERSION = 2
LOGGER = logging.getLogger(__name__)
PICTURES = 32
TIMEOUT = timedelta(days=7)
"""How long ranks wait for one another: on a CPU a block can take hours."""
IMAGES_AHEAD = 256
"""Images read ahead of decoding, enough to cover the opening of the next tar."""
BATCHES_AHEAD = 2
"""Batches decoded ahead of the autoencoder."""
CPU_BATCH = 8
"""Batch size chosen on a CPU, where larger ones are no faster."""
MAX_PIXELS = 2**23
"""Largest number of pixels in a chosen batch: with 128 channels, 32-bit indices on a GPU reach no further."""


class EncodeConfig(Config):
    """Settings of the encoding stage."""

    vae: VaeRef | None
    """Autoencoder that turns images into latents. Null: keep pixels, for models that work on images."""
    resolution: int = Field(default=256, ge=8)
    """Side of the square to which images are resized and cropped, in pixels."""
    split: str = "train"
    """Split of the data set to encode, such as ``train``."""
    flips: bool = True
    """Also encode the mirror image of every image: the latent of a mirror image is not the mirrored latent. Not used
    for pixels."""
    precision: Arithmetic = "float32"
    """Arithmetic of the autoencoder. Use tf32 on GPUs only. bfloat16 changes the means by about 1 % of their standard
    deviation."""
    compile: bool = False
    """Compile the autoencoder's encoder: takes minutes at the start, then encoding is faster. The last bits of the
    latents differ."""
    batch_size: int | None = Field(default=None, ge=1)
    """Images in one pass of the autoencoder. It can change the last bits of the latents. Null: the largest power of two
    that fits in half of the free GPU memory, or 8 on a CPU."""
    block_rows: int = Field(default=4096, ge=1)
    """Images in one object of the store, the unit of work and resume. 4096 latents of 32 x 32 are 32 MiB, as are 1024
    of 64 x 64."""
    chunk_rows: int = Field(default=256, ge=1)
    """Images in one chunk of an object, the unit of reading. 256 latents of 32 x 32 are 2 MiB, as are 64 of 64 x 64."""
    threads: int = operational(0, ge=0)
    """Threads that decode images. 0: one for each core, shared among the ranks of a machine."""


def held_out_config(config: EncodeConfig) -> EncodeConfig:
    """How the held-out images are encoded beside training images: in the same way, but never mirrored."""
    return config.model_copy(update={"split": HELD_OUT, "flips": False})


def run(config: EncodeConfig, shards: ShardManifest, *, out: StageOutput, tracker: Tracker) -> LatentManifest:
    """Encode the missing blocks, each on one of the ranks, and commit the latents.

    Raises:
        InputError: the resolution does not fit the autoencoder, or there is no such split.
        StorageError: a tar is not what was committed, or the disk is full.
        DitflowError: the autoencoder's latents are not finite.
    """
    _count(config, shards)
    with joined(TIMEOUT) as ranks, arithmetic(config.precision):
        work = _work(config, shards, out)
        writer = RowWriter(out, _layout(config, work.rows, work.shape), _attributes(work))
        _encode(work, writer, out, ranks, tracker)
        ranks.finish()
        if ranks.first:
            _commit(work, writer, out, tracker)
        ranks.wait()
        return LatentManifest.read(out.uri)


@dataclass(frozen=True)
class _Work:
    """What is the same for all blocks."""

    config: EncodeConfig
    shards: ShardManifest
    vae: Vae | None
    shape: tuple[int, int, int]
    """(C, h, h) of a latent, or of the pixels."""
    batch_size: int

    @property
    def rows(self) -> int:
        """Images of the split."""
        return _count(self.config, self.shards)


def _work(config: EncodeConfig, shards: ShardManifest, out: StageOutput) -> _Work:
    vae = load_vae(config.vae, device(), dtype(config.precision)) if config.vae else None
    shape = _shape(config, vae)
    batch_size = _batch_size(config, vae, out)
    if vae and config.compile:
        vae.model.encoder.compile(dynamic=False)  # a graph for each batch size, whichever comes first
    return _Work(config, shards, vae, shape, batch_size)


def _commit(work: _Work, writer: RowWriter, out: StageOutput, tracker: Tracker) -> None:
    picture, metrics = _picture(work, out, tracker)
    config, vae = work.config, work.vae
    facts = _facts(config, work.shards, work.shape, vae.info(config.vae.source) if config.vae and vae else None)
    found = statistics(out, _layout(config, work.rows, work.shape).blocks) if vae else None
    if vae and found is None:
        LOGGER.warning("encode: no statistics of the channels: some blocks have no sums, as those of earlier versions")
    files, counts = [*writer.finish(), picture], {"images": work.rows}
    out.commit(LatentManifest, files, counts=counts, metrics=metrics, statistics=found, **facts)


def _facts(
    config: EncodeConfig, shards: ShardManifest, shape: tuple[int, int, int], vae: VaeInfo | None
) -> dict[str, Any]:
    """The manifest's own fields."""
    return {
        "resolution": config.resolution,
        "split": config.split,
        "flips": _flips(config),
        "latent_shape": shape,
        "class_names": shards.class_names,
        "vae": vae,
    }


def _batch_size(config: EncodeConfig, vae: Vae | None, out: StageOutput) -> int:
    """Images in a pass. A chosen size is stored, so that a resumed run makes the same bits."""
    if config.batch_size:
        return config.batch_size
    record = out.url("records/batch_size")
    if not uri.exists(record):
        uri.create(record, sealed(json.dumps({"images": _chosen_batch(config, vae)}).encode()))
    try:
        return int(json.loads(opened(uri.read(record)))["images"])
    except BrokenSealError as error:
        text = f"{uri.redact(record)}: damaged; delete {uri.redact(out.uri)} and run encode again"
        raise StorageError(text) from error


def _chosen_batch(config: EncodeConfig, vae: Vae | None) -> int:
    if vae is None or vae.model.device.type == "cpu":
        return CPU_BATCH
    image = torch.zeros(1, config.resolution, config.resolution, 3, dtype=torch.uint8)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    vae.encode(image)
    needed = torch.cuda.max_memory_allocated() - before
    free, _ = torch.cuda.mem_get_info()
    return fitting_batch(free, needed, config.resolution)


def fitting_batch(free: int, needed: int, resolution: int) -> int:
    """The largest power of two of images whose pass fits in half of the free memory.

    Args:
        free: free bytes of the device.
        needed: bytes that a pass of one image needs.
        resolution: side of an image in pixels.
    """
    most = min(free / 2 / needed, MAX_PIXELS / resolution**2)
    return int(2 ** math.floor(math.log2(max(most, 1))))


def _encode(work: _Work, writer: RowWriter, out: StageOutput, ranks: Ranks, tracker: Tracker) -> None:
    """Write this rank's share of the missing blocks. While one is written, the next is encoded."""
    missing = ranks.agreed(writer.missing())  # listed once, since blocks that fast ranks write are missing no longer
    blocks = [(block, *writer.bounds(block)) for block in missing]
    mine = blocks[ranks.rank :: ranks.world_size]
    todo = _rows(blocks)
    share = Share(tracker, work.rows - todo, todo)
    encoded = _encoded(work, [(start, stop) for _, start, stop in mine])
    written: Future[None] | None = None
    with threads(1) as thread:
        done = 0
        for block, start, stop in mine:
            batches = islice(encoded, -(-(stop - start) // work.batch_size))
            arrays = gathered(_until_failed(batches, written), share, start=done, total=_rows(mine), unit="images")
            if written:
                written.result()
            written = thread.submit(_write, work, writer, out, block, arrays)
            done += stop - start
        if written:
            written.result()


def _write(work: _Work, writer: RowWriter, out: StageOutput, block: int, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Commit the sums of a block's latents, then the block."""
    if work.vae:
        commit_sums(out, block, arrays)
    writer.write(block, arrays)


def _rows(blocks: list[tuple[int, int, int]]) -> int:
    return sum(stop - start for _, start, stop in blocks)


def _until_failed(
    batches: Iterator[dict[str, NDArray[Any]]], written: Future[None] | None
) -> Iterator[dict[str, NDArray[Any]]]:
    """The batches; raises once the writing of the previous block has failed."""
    for batch in batches:
        if written and written.done():
            written.result()
        yield batch


def _count(config: EncodeConfig, shards: ShardManifest) -> int:
    """Images of the split."""
    if config.split not in shards.splits:
        raise InputError(f"encode.split: the data has no split {config.split!r}, only {', '.join(shards.splits)}")
    return shards.splits[config.split].count


def _flips(config: EncodeConfig) -> int:
    """Views of an image."""
    return 2 if config.flips and config.vae else 1


def _shape(config: EncodeConfig, vae: Vae | VaeInfo | None) -> tuple[int, int, int]:
    """(C, h, h) of a latent, or of the pixels."""
    if vae is None:
        return 3, config.resolution, config.resolution
    if config.resolution % vae.downsample:
        raise InputError(f"encode.resolution: {config.resolution} px is not a multiple of the VAE's {vae.downsample}")
    if isinstance(vae, Vae) and vae.kind.side not in (None, config.resolution):
        raise InputError(f"encode.resolution: this autoencoder takes images of {vae.kind.side} px alone; set that")
    side = config.resolution // vae.downsample
    return vae.channels, side, side


def _layout(config: EncodeConfig, rows: int, shape: tuple[int, int, int]) -> RowLayout:
    if config.vae is None:
        return pixel_layout(rows, config.resolution, config.block_rows, config.chunk_rows)
    return latent_layout(rows, _flips(config), shape, config.block_rows, config.chunk_rows)


def _encoded(work: _Work, bounds: list[tuple[int, int]]) -> Iterator[dict[str, NDArray[Any]]]:
    """The rows within the bounds, a batch at a time. A batch spans no two bounds."""
    for batch, images in ahead(_batches(work, bounds), BATCHES_AHEAD):
        arrays = _moments(work.vae, images, work.config.flips) if work.vae else {"image": images.numpy()}
        yield arrays | _keys(batch)


def _batches(work: _Work, bounds: list[tuple[int, int]]) -> Iterator[tuple[list[Sample], torch.Tensor]]:
    """Images of the split within the bounds, a batch at a time, with their pixels uint8 (B, H, H, 3)."""
    config = work.config
    parts = (read_images(work.shards, config.split, start, stop) for start, stop in bounds)
    samples = ahead(chain.from_iterable(parts), IMAGES_AHEAD)
    with threads(config.threads or cores()) as pool:
        for start, stop in bounds:
            for first in range(start, stop, work.batch_size):
                batch = list(islice(samples, min(work.batch_size, stop - first)))
                images = pool.map(lambda sample: transforms.load_fast(sample.data, config.resolution), batch)
                yield batch, torch.from_numpy(np.stack(list(images)))


def _keys(batch: list[Sample]) -> dict[str, NDArray[Any]]:
    return {
        "label": np.array([sample.label for sample in batch], np.int32),
        "source_index": np.array([sample.source_index for sample in batch], np.int64),
    }


def _moments(vae: Vae, images: torch.Tensor, flips: bool) -> dict[str, NDArray[Any]]:
    """Mean and standard deviation, float16 (B, F, C, h, h), of images (B, H, H, 3)."""
    images = images.to(vae.model.device)
    views = [images, images.flip(2)] if flips else [images]
    moments = [vae.encode(view) for view in views]
    mean, std = (torch.stack(part, 1).half() for part in zip(*moments, strict=True))
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise DitflowError("encode: the autoencoder's latents are not finite in float16; check its weights")
    return {"mean": mean.cpu().numpy(), "std": std.cpu().numpy()}


def _attributes(work: _Work) -> dict[str, Any]:
    config, vae = work.config, work.vae
    preprocessing = {"preprocessing": f"{transforms.FAST_CROP_ID}-{config.resolution}"}
    if vae is None:
        return {"range": [0, 255], **preprocessing}
    return {
        "vae_sha256": vae.sha256,
        "scaling_factor": vae.scaling_factor,
        "shift_factor": vae.shift_factor,
        "scaled": False,
        "input_range": [-1.0, 1.0],
        **preprocessing,
        "precision": config.precision,
        "compiled": config.compile,
        "batch_size": work.batch_size,
    }


def _picture(work: _Work, out: StageOutput, tracker: Tracker) -> tuple[FileEntry, dict[str, float]]:
    """A picture of the first images, each beside its reconstruction, and the PSNR of the reconstructions in dB."""
    batches = (images for _, images in _batches(work, [(0, min(PICTURES, work.rows))]))
    vae = work.vae
    if vae is None:
        return publish(out, tracker, "images.png", image_grid(torch.cat(list(batches)).numpy(), columns=8, gap=2)), {}
    pairs = torch.cat([_with_decoded(vae, images) for images in batches])
    error = (pairs[:, 0].double() - pairs[:, 1].double()).square().mean().item()
    picture = image_grid(pairs.flatten(0, 1).numpy(), columns=8, gap=2)
    psnr = 10 * math.log10(255**2 / max(error, 1e-12))
    return publish(out, tracker, "reconstructions.png", picture), {"reconstruction_psnr_db": psnr}


def _with_decoded(vae: Vae, images: torch.Tensor) -> torch.Tensor:
    """Images uint8 (B, H, H, 3) with their reconstructions, (B, 2, H, H, 3)."""
    mean, _ = vae.encode(images)
    return torch.stack([images, vae.decode((mean - vae.shift_factor) * vae.scaling_factor).cpu()], 1)


def check(config: EncodeConfig, shards: ShardManifest, _: PlanContext) -> None:
    """Check that the split can be encoded; the images need not be packed yet.

    Raises:
        InputError: as `run`.
    """
    _layout(config, _count(config, shards), _shape(config, load_vae(config.vae) if config.vae else None))


def estimate(config: EncodeConfig, shards: ShardManifest, plan: PlanContext) -> StageCost:
    """What it takes to encode the split.

    Raises:
        InputError: resolution, split or autoencoder cannot be used.
    """
    vae, ref = info(config.vae) if config.vae else None, config.vae
    rows, shape = _count(config, shards), _shape(config, vae)
    layout = _layout(config, rows, shape)
    seconds = rows / plan.rates["load"] / plan.nodes
    if ref:
        batch = config.batch_size or CPU_BATCH
        rate = plan.rate("encode", lambda: encoder_rate(ref, config.resolution, config.precision, batch))
        seconds = beside(seconds, rows * _flips(config) / rate / at_once(plan.world_size))
    planned = (PLANNED,) * _flips(config) if vae else None
    return StageCost(
        images=rows,
        objects=store_objects(layout),
        size=layout.size,
        units=layout.blocks,
        done=plan.records(),
        seconds=seconds,
        leaves={"counts": {"images": rows}, "statistics": planned, **_facts(config, shards, shape, vae)},
        save_disk="encode.flips=false, half the latents" if config.flips else "",
    )


DEFINITION = StageDefinition(
    EncodeConfig,
    LatentManifest,
    VERSION,
    run,
    lambda config, _: vae_inputs(config.vae),
    estimate,
    {"encode": "images passed through the autoencoder's encoder in a second, on one rank"},
    check,
)
