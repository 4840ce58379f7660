"""Shuffled batches of latents: our store read in place, staged and streamed, against other formats."""

# N = latents, B = latents in a batch, C = channels, h = latent side

import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import fsspec
import numpy as np
import webdataset
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from numpy.typing import NDArray

from benchmarks.common import Measured, Result, main
from storage.config import Config
from storage.latents import LatentManifest, VaeInfo, latent_layout
from storage.manifest import stage_output
from storage.order import POOL, permutation, pooled
from storage.rows.store import RowReader, RowWriter

RATIOS = {
    "raw_vs_memmap": ("raw", "memmap"),
    "raw_vs_npy": ("raw", "npy"),
    "raw_vs_webdataset": ("raw", "webdataset"),
    "raw_vs_oindex": ("raw", "oindex"),
    "staged_vs_memmap": ("staged", "memmap"),
    "streamed_vs_memmap": ("streamed", "memmap"),
}
VAE = VaeInfo(source="", sha256="0" * 64, downsample=8, channels=4, scaling_factor=1)

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """What is read, and how many times."""

    rows: int = 49_152
    """N."""
    shape: tuple[int, int, int] = (4, 32, 32)
    """(C, h, h), float16."""
    batch_size: int = 256
    """B."""
    block_rows: int = 4096
    chunk_rows: int = 256
    rounds: int = 7
    """Turns of each reader."""
    slow_batches: int = 8
    """Batches in a turn of a reader that reads samples one by one; the others read all N latents."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a latent."""
        return 2 * int(np.prod(self.shape))


class Counted(MemoryFileSystem):
    """``memory://`` as ``counted://``, which counts its ranged requests by array."""

    protocol = "counted"
    gets: dict[str, list[int]] = {}  # noqa: RUF012  shared by all instances, as the store is
    """Bytes of each request."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("counted://", "memory://")))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """The bytes from start to end."""
        data = bytes(super().cat_file(path, start, end, **kwargs))
        name = path.partition("/data/")[2].split("/")[0]
        self.gets.setdefault(name, []).append(len(data))
        return data


def measure(latents: Path | None = None) -> Measured:
    """Measure all readers, on made latents or on those of an output of ``encode``.

    Raises:
        InputError: there is no such output.
    """
    with tempfile.TemporaryDirectory() as folder:
        if latents is None:
            return contest(Task(), Path(folder))
        manifest = LatentManifest.read(str(latents))
        items = np.arange(manifest.counts["images"])
        means = RowReader(manifest, Path(folder, "cache")).take("mean", items, np.zeros_like(items))
        return contest(Task(rows=len(means), shape=manifest.latent_shape), Path(folder), means)


def contest(task: Task, folder: Path, latents: NDArray[np.float16] | None = None) -> Measured:
    """Latents per second of CPU time, in turns, and the requests of one streamed epoch.

    Args:
        task: what is read.
        folder: for the stores.
        latents: (N, C, h, h); None makes some.

    Raises:
        ValueError: a reader returns other latents than np.memmap.
    """
    fsspec.register_implementation("counted", Counted, clobber=True)
    if latents is None:
        latents = np.random.default_rng(0).integers(0, 0x7C00, (task.rows, *task.shape), np.uint16).view(np.float16)
    turns = readers(task, folder, latents)
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for round_number in range(-1, task.rounds):
        for name, turn in turns.items():
            begin = time.process_time()
            count = turn(round_number + 1)
            if round_number >= 0:  # one to warm up
                speeds[name].append(count / max(time.process_time() - begin, 1e-9))
    values = {name: median(found) for name, found in speeds.items()}
    results = [Result(name, value, "samples/CPU-s") for name, value in values.items()]
    counted = requests(task, folder, latents)
    ratios = {name: values[ours] / values[peer] for name, (ours, peer) in RATIOS.items()}
    return [*results, *counted], ratios


Turn = Callable[[int], int]
"""Reads batches of an epoch and returns the number of latents."""


def readers(task: Task, folder: Path, latents: NDArray[np.float16]) -> dict[str, Turn]:
    """A turn of every reader; each is checked first."""
    local, remote = write(task, str(folder / "local"), latents), write(task, "counted://root", latents)
    latents.tofile(folder / "flat.bin")
    flat = np.memmap(folder / "flat.bin", np.float16, "r", shape=latents.shape)
    group = zarr.open_group(f"{local.uri}/data", mode="r")
    oindex: Any = group["mean"]
    in_place, copy = RowReader(local, folder / "cache"), RowReader(remote, folder / "cache")
    npy = write_npy(folder / "npy", latents)
    plain = np.zeros(task.batch_size, np.int64)
    shuffled: dict[str, Callable[[Indices], NDArray[Any]]] = {
        "memmap": lambda items: flat[items],
        "raw": lambda items: in_place.take("mean", items, plain[: len(items)]),
        "staged": lambda items: copy.take("mean", items, plain[: len(items)]),
        "npy": lambda items: np.stack([np.load(npy[item]) for item in items]),
        "oindex": lambda items: oindex.oindex[items, 0],
    }
    for name, take in shuffled.items():
        some = permutation(1, 0, task.rows)[: task.batch_size]
        if not np.array_equal(take(some), latents[some]):
            raise ValueError(f"{name} returns other latents")
    turns = {name: _turn(task, take, slow=name in ("npy", "oindex")) for name, take in shuffled.items()}
    turns["streamed"] = streamed(task, RowReader(remote, folder / "cache", streamed=True), latents)
    turns["webdataset"] = from_tars(task, write_tars(task, folder / "tars", latents))
    return turns


def write(task: Task, root: str, latents: NDArray[np.float16]) -> LatentManifest:
    """A store with these means, and with the same in reverse as standard deviations."""
    out = stage_output(root, LatentManifest.STAGE, 1, Config(), parents={}, inputs={})
    writer = RowWriter(out, latent_layout(task.rows, 1, task.shape, task.block_rows, task.chunk_rows), {})
    for block in writer.missing():
        start, stop = writer.bounds(block)
        mean, keys = latents[start:stop, None], np.arange(start, stop)
        label = keys.astype(np.int32)
        writer.write(block, {"mean": mean, "std": mean[::-1], "label": label, "source_index": keys})
    fields = {"resolution": 256, "split": "train", "flips": 1, "latent_shape": task.shape, "class_names": ()}
    return out.commit(LatentManifest, writer.finish(), counts={"images": task.rows}, vae=VAE, **fields)


def write_npy(folder: Path, latents: NDArray[np.float16]) -> list[Path]:
    """One file a latent."""
    folder.mkdir()
    paths = [folder / f"{number:06d}.npy" for number in range(len(latents))]
    for path, latent in zip(paths, latents, strict=True):
        np.save(path, latent)
    return paths


def write_tars(task: Task, folder: Path, latents: NDArray[np.float16]) -> list[str]:
    """Tars of ``.npy`` members, as many in each as there are rows in a block."""
    folder.mkdir()
    for first in range(0, len(latents), task.block_rows):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for number, latent in enumerate(latents[first : first + task.block_rows], first):
                buffer = io.BytesIO()
                np.save(buffer, latent)
                info = tarfile.TarInfo(f"{number:06d}.npy")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)
    return sorted(map(str, folder.iterdir()))


def _turn(task: Task, take: Callable[[Indices], object], *, slow: bool) -> Turn:
    def turn(epoch: int) -> int:
        batches = list(_batches(permutation(0, epoch, task.rows), task.batch_size))
        batches = batches[: task.slow_batches] if slow else batches
        for items in batches:
            take(items)
        return sum(map(len, batches))

    return turn


def _batches(order: Indices, size: int) -> Iterator[Indices]:
    return (order[first : first + size] for first in range(0, len(order), size))


def streamed(task: Task, reader: RowReader, latents: NDArray[np.float16]) -> Turn:
    """Whole epochs in pooled order, with each chunk prefetched."""

    def turn(epoch: int) -> int:
        order, span = pooled(0, epoch, task.rows, task.chunk_rows), POOL * task.chunk_rows
        for first in range(0, len(order), task.batch_size):
            ahead = order[first // span * span :][: 2 * span]
            reader.expect("mean", ahead, np.zeros(len(ahead), np.int64))
            items = order[first : first + task.batch_size]
            found = reader.take("mean", items, np.zeros(len(items), np.int64))
            if first == 0 and not np.array_equal(found, latents[items]):
                raise ValueError("streamed returns other latents")
        return len(order)

    return turn


def from_tars(task: Task, tars: list[str]) -> Turn:
    """Samples through a shuffle buffer as large as a pool, which is filled before the timing."""
    pipeline = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False)
    size = min(POOL * task.chunk_rows, task.rows)
    samples = (
        np.load(io.BytesIO(sample["npy"])) for _ in cycle([0]) for sample in pipeline.shuffle(size, initial=size)
    )

    def turn(_: int) -> int:
        for _ in range(task.slow_batches):
            np.stack(list(islice(samples, task.batch_size)))
        return task.slow_batches * task.batch_size

    return turn


def requests(task: Task, folder: Path, latents: NDArray[np.float16]) -> list[Result]:
    """The requests of one epoch of means and standard deviations, and those of the start before it."""
    manifest = write(task, "counted://again", latents)
    RowReader(manifest, folder / "cache", streamed=True)  # the first start reads the whole store to check it
    Counted.gets.clear()
    reader = RowReader(manifest, folder / "cache", streamed=True)
    opened = sum(map(len, Counted.gets.values()))
    Counted.gets.clear()
    order, span = pooled(0, 0, task.rows, task.chunk_rows), POOL * task.chunk_rows
    for first in range(0, len(order), task.batch_size):
        ahead = order[first // span * span :][: 2 * span]
        items = order[first : first + task.batch_size]
        for name in ("mean", "std"):
            reader.expect(name, ahead, np.zeros_like(ahead))
            reader.take(name, items, np.zeros_like(items))
    gets = {name: len(found) for name, found in Counted.gets.items()}
    read = sum(sum(found) for found in Counted.gets.values())
    batches = task.rows / 256
    return [
        Result("gets_per_256", gets["mean"] / batches, "of means"),
        Result("gets_per_256_moments", sum(gets.values()) / batches, "of means and deviations"),
        Result("read_amplification", read / (2 * task.rows * task.row_bytes), "bytes read / bytes used"),
        Result("gets_at_start", opened, "indexes, labels, metadata"),
    ]


if __name__ == "__main__":
    main(measure, __doc__, latents="an output of encode to read, instead of made latents")
