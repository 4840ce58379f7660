"""The stage `encode`, from tars on the disk to a committed store, and the autoencoder's bare forward pass.

The weights are random; speed does not depend on them.
"""

# B = batch, H = image side

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.common import Measured, Result, main, seconds
from benchmarks.photos import jpeg
from dit import encode
from dit.devices import Arithmetic, arithmetic, device, dtype
from dit.encode import EncodeConfig
from dit.pixels import to_unit
from dit.vae import VaeRef, load_vae
from storage.archives.known import input_digests
from storage.archives.open import ArchiveRef
from storage.images import transforms
from storage.latents import LatentManifest
from storage.manifest import stage_output
from storage.shards import shard
from storage.shards.shard import ShardConfig, ShardManifest, read_images
from storage.tracker import NullTracker


@dataclass(frozen=True)
class Task:
    """What is encoded, and by what."""

    widths: tuple[int, ...]
    """Channels of the autoencoder at each resolution; all else is as in Stable Diffusion."""
    images: int
    resolution: int
    batch_size: int
    block_rows: int
    precisions: tuple[Arithmetic, ...]
    rounds: int
    groups: int = 32
    """Groups of the autoencoder's group norms."""


CPU = Task((32, 64, 128, 128), 32, 128, batch_size=8, block_rows=8, precisions=("float32",), rounds=3)
"""A quarter of Stable Diffusion's widths at 128 px is 64 times cheaper, so the stage's own cost shows more."""
GPU = Task(
    (128, 256, 512, 512),
    4096,
    256,
    batch_size=64,
    block_rows=1024,
    precisions=("float32", "tf32", "bfloat16"),
    rounds=2,
)
FORMS = {"forward": torch.channels_last, "forward_contiguous": torch.contiguous_format}
PICTURES = 64
"""Number of different images; the others are copies."""


def measure() -> Measured:
    """Measure at a size that takes minutes on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        return contest(GPU if torch.cuda.is_available() else CPU, Path(folder))


def contest(task: Task, folder: Path) -> Measured:
    """The stage and both forward passes, in turns; the fastest of each, because other work only adds time.

    The stage's fixed cost, such as loading the autoencoder, is measured by a second run that finds all blocks, and
    subtracted. Without a GPU there are also ratios of CPU time, which depend less on other work on the machine.
    """
    source, ref = _tars(task, folder), _autoencoder(task, folder / "vae")
    results: list[Result] = []
    ratios: dict[str, float] = {}
    for precision in task.precisions:
        config = EncodeConfig(
            vae=ref,
            resolution=task.resolution,
            precision=precision,
            batch_size=task.batch_size,
            block_rows=task.block_rows,
            chunk_rows=task.block_rows,
        )
        best, processor = _fastest(task, config, source, folder)
        suffix = "" if precision == "float32" else f"_{precision}"
        results += _figures(task, best, suffix)
        ratios |= _ratios(best, suffix)
        if not torch.cuda.is_available():
            results += _figures(task, processor, f"_cpu{suffix}")
            ratios |= _ratios(processor, f"_cpu{suffix}")
    return results, ratios


def _figures(task: Task, best: dict[str, float], suffix: str) -> list[Result]:
    times = best | {"encode": best["stage"] - best["once"]}
    speeds = [Result(f"{name}{suffix}", task.images / times[name], "images/s") for name in ("encode", *FORMS)]
    return [*speeds, *(Result(f"{name}{suffix}", best[name], "s") for name in ("stage", "once"))]


def _ratios(best: dict[str, float], suffix: str) -> dict[str, float]:
    return {
        f"encode_vs_forward{suffix}": best["forward"] / (best["stage"] - best["once"]),
        f"channels_last_vs_contiguous{suffix}": best["forward_contiguous"] / best["forward"],
    }


def _fastest(
    task: Task, config: EncodeConfig, source: ShardManifest, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Wall-clock seconds of each part, and CPU seconds."""
    forward = {name: partial(_forward, *_in_memory(config, source, form)) for name, form in FORMS.items()}
    clock: dict[str, list[float]] = {name: [] for name in ("stage", "once", *FORMS)}
    processor: dict[str, list[float]] = {name: [] for name in clock}

    def timed(name: str, work: Callable[[], object]) -> None:
        begin = time.process_time()
        clock[name].append(seconds(work))
        processor[name].append(time.process_time() - begin)

    with arithmetic(config.precision):
        for warm_up in forward.values():
            warm_up()
    for number in range(task.rounds):
        root = folder / f"{config.precision}-{number}"
        timed("stage", partial(_stage, root, config, source))
        next(root.rglob("manifest.json")).unlink()
        timed("once", partial(_stage, root, config, source))
        with arithmetic(config.precision):
            for name, work in forward.items():
                timed(name, work)
    first, second = ({name: min(times) for name, times in found.items()} for found in (clock, processor))
    return first, second


def _in_memory(
    config: EncodeConfig, source: ShardManifest, form: torch.memory_format
) -> tuple[AutoencoderKL, list[Tensor]]:
    """The autoencoder, and its input: batches (B, 3, H, H) of images and of mirror images."""
    assert config.vae is not None
    assert config.batch_size is not None
    model = load_vae(config.vae, device(), dtype(config.precision)).model.to(memory_format=form)
    images = np.stack([transforms.load_fast(item.data, config.resolution) for item in read_images(source, "train")])
    batches = map(to_unit, torch.from_numpy(images).split(config.batch_size))
    views = [view for batch in batches for view in (batch, batch.flip(3))]
    return model, [view.to(model.device, model.dtype).contiguous(memory_format=form) for view in views]


@torch.no_grad()
def _forward(model: AutoencoderKL, batches: list[Tensor]) -> None:
    for batch in batches:
        model.encode(batch)


def _stage(root: Path, config: EncodeConfig, source: ShardManifest) -> None:
    """The stage, with a picture of one image instead of 32."""
    out = stage_output(str(root), LatentManifest.STAGE, encode.VERSION, config, parents={"shards": source}, inputs={})
    with patch.object(encode, "PICTURES", 1):
        encode.run(config, source, out=out, tracker=NullTracker())


def _tars(task: Task, folder: Path) -> ShardManifest:
    images = folder / "images" / "any"
    images.mkdir(parents=True)
    pictures = [jpeg(number) for number in range(min(PICTURES, task.images))]
    for number in range(task.images):
        (images / f"{number:06d}.jpg").write_bytes(pictures[number % len(pictures)])
    config, archive = ShardConfig(), ArchiveRef(train=str(images.parent))
    inputs = input_digests(archive)
    out = stage_output(str(folder), shard.STAGE, shard.VERSION, config, parents={}, inputs=inputs)
    return shard.run(config, archive, out=out, tracker=NullTracker())


def _autoencoder(task: Task, folder: Path) -> VaeRef:
    count = len(task.widths)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        block_out_channels=task.widths,
        layers_per_block=2,
        norm_num_groups=task.groups,
    ).save_pretrained(folder)
    return VaeRef(source=str(folder))


if __name__ == "__main__":
    main(measure, __doc__)
