"""Sharding: images per second against tarfile and webdataset's writer; time and memory from 1,000 to 50,000 images.

With ``--photographs`` the images are those of a zip of class folders, such as CIFAR-10's ``train.zip``.
"""

import io
import multiprocessing
import os
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path

from webdataset import ShardWriter

from benchmarks.common import Measured, Result, main, seconds
from benchmarks.imagenet_like import CLASSES, SIZE, write_archive
from benchmarks.memory import peak_mib
from storage.archives.known import input_digests
from storage.archives.once import listed_once
from storage.archives.open import ArchiveRef
from storage.manifest import stage_output
from storage.shards import shard
from storage.shards.shard import ShardConfig, ShardManifest
from storage.tracker import NullTracker

IMAGES = 4096
"""Images of ImageNet's typical size."""
SMALL, GROWTH = (64, 48), (1_000, 10_000, 50_000)
"""Width and height of the images for `growth`, and their counts."""
REPEATS = 3
PER_SHARD = 1024


def measure(photographs: Path | None = None) -> Measured:
    """Measure everything in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        if photographs:
            return against_peers(Path(folder), photographs)
        archive = Path(folder, "images.tar")
        write_archive(archive, IMAGES, CLASSES, SIZE)
        parts = [against_peers(Path(folder), archive), growth(Path(folder), GROWTH, SMALL)]
    results = [result for found, _ in parts for result in found]
    return results, {name: ratio for _, found in parts for name, ratio in found.items()}


def against_peers(folder: Path, archive: Path, repeats: int = REPEATS) -> Measured:
    """The stage against writers that read the same archive and write tars of the same images, in turns.

    The stage also lists, shuffles, checks every image, hashes and syncs; all may use all cores. What a turn leaves to
    the disk is written before the next one begins. The fastest of each counts, by the clock and by processor time.
    """
    clock: dict[str, list[float]] = {name: [] for name in WRITERS}
    processor: dict[str, list[float]] = {name: [] for name in WRITERS}
    for turn in range(repeats):
        for name, write in WRITERS.items():
            os.sync()
            begin = time.process_time()
            clock[name].append(seconds(partial(write, archive, folder / f"{name}-{turn}")))
            processor[name].append(time.process_time() - begin)
    images = sum(1 for _ in _images(archive))
    best, least = ({name: min(times) for name, times in found.items()} for found in (clock, processor))
    results = [Result(name, images / took, "images/s") for name, took in best.items()]
    results += [Result(f"{name}_cpu", 1e6 * took / images, "us/image") for name, took in least.items()]
    results.append(Result("image", archive.stat().st_size / images, "bytes"))
    peers = [name for name in WRITERS if name != "shard"]
    ratios = {f"shard_vs_{name}": best[name] / best["shard"] for name in peers}
    return results, ratios | {f"shard_cpu_vs_{name}": least[name] / least["shard"] for name in peers}


def growth(folder: Path, counts: tuple[int, ...], size: tuple[int, int], classes: int = CLASSES) -> Measured:
    """Time and peak memory of a process that shards, for each count of images."""
    results, times = list[Result](), list[float]()
    for images in counts:
        archive, name = folder / f"{images}.tar", f"{images // 1000}k" if images >= 1000 else str(images)
        write_archive(archive, images, classes, size)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            took, peak = pool.apply(_measured, (archive, folder / f"out-{images}"))
        times.append(took / images)
        results += [Result(f"shard_{name}", images / took, "images/s"), Result(f"peak_rss_mib_{name}", peak, "MiB")]
    first, last = (result.name.removeprefix("shard_") for result in (results[0], results[-2]))
    return results, {f"growth_{last}_vs_{first}": times[-1] / times[0]}


def _measured(archive: Path, out: Path) -> tuple[float, float]:
    took = seconds(partial(_shard, archive, out, images_per_shard=128))
    return took, peak_mib()


def _shard(archive: Path, root: Path, images_per_shard: int = PER_SHARD) -> ShardManifest:
    config, ref = ShardConfig(images_per_shard=images_per_shard), ArchiveRef(train=str(archive))
    with listed_once():  # as every command does
        inputs = input_digests(ref)
        out = stage_output(str(root), shard.STAGE, shard.VERSION, config, parents={}, inputs=inputs)
        return shard.run(config, ref, out=out, tracker=NullTracker())


def _with_tarfile(archive: Path, root: Path, *, sync: bool = False) -> None:
    """Read every image and write it with its label."""
    root.mkdir()
    images = _images(archive)
    for number in count():
        some = list(islice(images, PER_SHARD))
        if not some:
            return
        with (root / f"{number:05d}.tar").open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as packed:
                for position, (label, data) in enumerate(some):
                    for ending, content in (("cls", str(label).encode()), ("jpg", data)):
                        info = tarfile.TarInfo(f"{position:08d}.{ending}")
                        info.size = len(content)
                        packed.addfile(info, io.BytesIO(content))
            if sync:
                os.fsync(file.fileno())


def _with_webdataset(archive: Path, root: Path) -> None:
    """The same with webdataset's `ShardWriter`, whose writer of tars is that of img2dataset, too."""
    root.mkdir()
    with ShardWriter(f"{root}/%05d.tar", maxcount=PER_SHARD, verbose=0, encoder=False) as writer:
        for position, (label, data) in enumerate(_images(archive)):
            writer.write({"__key__": f"{position:08d}", "cls": str(label).encode(), "jpg": data})


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "tarfile": _with_tarfile,
    "tarfile_synced": partial(_with_tarfile, sync=True),
    "webdataset": _with_webdataset,
    "shard": _shard,
}


def _images(archive: Path) -> Iterator[tuple[int, bytes]]:
    """Label and bytes of every image, with Python's own readers, from beginning to end."""
    return _of_zip(archive) if archive.suffix == ".zip" else _of_class_tars(archive)


def _of_class_tars(archive: Path) -> Iterator[tuple[int, bytes]]:
    with tarfile.open(archive) as outer:
        for label, found in enumerate(outer):
            with tarfile.open(fileobj=outer.extractfile(found)) as inner:
                for info in inner:
                    file = inner.extractfile(info)
                    assert file is not None
                    yield label, file.read()


def _of_zip(archive: Path) -> Iterator[tuple[int, bytes]]:
    labels: dict[str, int] = {}
    with zipfile.ZipFile(archive) as packed:
        for info in packed.infolist():
            if not info.is_dir():
                folder = info.filename.rpartition("/")[0]
                yield labels.setdefault(folder, len(labels)), packed.read(info)


if __name__ == "__main__":
    main(measure, __doc__, photographs="zip of class folders, instead of made images")
