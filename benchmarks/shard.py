"""Sharding: images per second against tarfile, and how time and memory grow from 1,000 to 50,000 images."""

import io
import multiprocessing
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path

from benchmarks.common import Measured, Result, main, seconds
from benchmarks.imagenet_like import CLASSES, SIZE, write_archive
from benchmarks.memory import peak_mib
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


def measure() -> Measured:
    """Measure everything in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        parts = [against_tarfile(Path(folder), IMAGES, SIZE), growth(Path(folder), GROWTH, SMALL)]
    results = [result for found, _ in parts for result in found]
    return results, {name: ratio for _, found in parts for name, ratio in found.items()}


def against_tarfile(folder: Path, images: int, size: tuple[int, int], classes: int = CLASSES) -> Measured:
    """The stage against tarfile, which reads the same archive and writes tars of the same images, in turns.

    The stage also lists, shuffles, checks every image, hashes and syncs; both may use all cores.
    """
    archive = folder / "images.tar"
    write_archive(archive, images, classes, size)
    ours, peer = [], []
    for turn in range(REPEATS):
        peer.append(seconds(partial(_with_tarfile, archive, folder / f"peer-{turn}")))
        ours.append(seconds(partial(_shard, archive, folder / f"ours-{turn}")))
    rates = {"shard": images / min(ours), "tarfile": images / min(peer)}
    results = [Result(name, rate, "images/s") for name, rate in rates.items()]
    results.append(Result("image", archive.stat().st_size / images, "bytes"))
    return results, {"shard_vs_tarfile": rates["shard"] / rates["tarfile"]}


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


def _shard(archive: Path, root: Path, images_per_shard: int = 1024) -> ShardManifest:
    config, ref = ShardConfig(images_per_shard=images_per_shard), ArchiveRef(train=str(archive))
    inputs = shard.input_digests(ref)
    out = stage_output(str(root), shard.STAGE, shard.VERSION, config, parents={}, inputs=inputs)
    return shard.run(config, ref, out=out, tracker=NullTracker())


def _with_tarfile(archive: Path, root: Path, images_per_shard: int = 1024) -> None:
    """Read every image and write it with its label."""
    root.mkdir()
    files = _read_with_tarfile(archive)
    for number in count():
        some = list(islice(files, images_per_shard))
        if not some:
            return
        with tarfile.open(root / f"{number:05d}.tar", "w") as packed:
            for position, (label, data) in enumerate(some):
                for ending, content in (("cls", str(label).encode()), ("jpg", data)):
                    info = tarfile.TarInfo(f"{position:08d}.{ending}")
                    info.size = len(content)
                    packed.addfile(info, io.BytesIO(content))


def _read_with_tarfile(archive: Path) -> Iterator[tuple[int, bytes]]:
    with tarfile.open(archive) as outer:
        for label, found in enumerate(outer):
            with tarfile.open(fileobj=outer.extractfile(found)) as inner:
                for info in inner:
                    file = inner.extractfile(info)
                    assert file is not None
                    yield label, file.read()


if __name__ == "__main__":
    main(measure, __doc__)
