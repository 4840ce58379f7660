"""Sets of images to measure, wherever they are stored, a batch at a time."""

# B = batch, H = image side

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from dit.random import Stream, words
from dit.ranks import cores
from storage import uri
from storage.archives.classes import Found
from storage.archives.folder import open_images
from storage.archives.listing import MAX_BYTES
from storage.errors import InputError
from storage.images import transforms
from storage.parallel import threads
from storage.rows.store import RowReader
from storage.seal import json_digest
from storage.shards.shard import Sample, ShardManifest, read_images

Batches = Iterator[NDArray[np.uint8]]
"""Images (B, H, H, 3)."""
NOISE_SEED: Final = 0


class ImageSet(Protocol):
    """Square images of one size, in a fixed order."""

    @property
    def count(self) -> int:
        """Number of images."""

    @property
    def side(self) -> int:
        """H, in pixels."""

    @property
    def digest(self) -> str:
        """Identifies the images, wherever they are stored."""

    @property
    def crop(self) -> str:
        """Id of the crop to this size; ``none`` if they are not cropped."""

    def batches(self, size: int, ranges: Sequence[range] | None = None) -> Batches:
        """Images in one pass, at most ``size`` at a time.

        Args:
            size: images in a batch.
            ranges: indices of the images, ascending; a batch spans no two ranges. All images by default.

        Raises:
            InputError: an image cannot be read, or has another size.
            StorageError: the images are not what was committed.
        """


@dataclass(frozen=True)
class SplitImages:
    """The images of a split, cropped as for training."""

    shards: ShardManifest
    split: str
    side: int
    crop: str = transforms.CROP_ID

    @property
    def count(self) -> int:
        """Number of images."""
        return self.shards.splits[self.split].count

    @property
    def digest(self) -> str:
        """Digest of shards and split."""
        return json_digest([self.shards.digest, self.split])

    def batches(self, size: int, ranges: Sequence[range] | None = None) -> Batches:
        """See `ImageSet.batches`."""
        with threads(cores()) as pool:
            samples: Iterator[Sample] = iter(())
            reached = -1
            for part in or_all(self, ranges):
                if part.start != reached:  # a tar that the ranges before have begun is not read again
                    samples = read_images(self.shards, self.split, part.start)
                reached = part.stop
                for rows in batch_ranges(size, [part]):
                    batch = islice(samples, len(rows))
                    yield np.stack(list(pool.map(lambda sample: transforms.load(sample.data, self.side), batch)))


@dataclass(frozen=True)
class StoredImages:
    """The array ``image`` of a row store."""

    reader: RowReader
    side: int
    digest: str
    crop: str = "none"

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.reader)

    def batches(self, size: int, ranges: Sequence[range] | None = None) -> Batches:
        """See `ImageSet.batches`."""
        for rows in batch_ranges(size, or_all(self, ranges)):
            yield self.reader.take("image", np.array(rows))


@dataclass(frozen=True)
class NoiseImages:
    """Uniform noise: all bytes are equally likely, and an image depends on its index alone."""

    count: int
    side: int
    crop: str = "none"

    @property
    def digest(self) -> str:
        """Digest of the seed."""
        return json_digest(["noise", NOISE_SEED])

    def batches(self, size: int, ranges: Sequence[range] | None = None) -> Batches:
        """See `ImageSet.batches`."""
        length = self.side**2 * 3
        for rows in batch_ranges(size, or_all(self, ranges)):
            bits = words(NOISE_SEED, Stream.NOISE_IMAGE, 0, rows, -(-length // 8)).astype("<u8")
            yield bits.view(np.uint8)[:, :length].reshape(-1, self.side, self.side, 3)


class FolderImages:
    """The images in a folder and its subfolders, in the order of their paths, without hidden ones.

    Args:
        url: the folder.
        side: H to which images are cropped, as for training; by default they must be squares of one size.

    Raises:
        InputError: there are no images, one is too large or cannot be read, or they are not squares of one size.
    """

    def __init__(self, url: str, side: int | None = None) -> None:
        self._fs = uri.filesystem(url)[0]
        self._images = _listed(url)
        self._paths = [image.location for image in self._images]
        self.crop = "none" if side is None else transforms.CROP_ID
        self.count = len(self._paths)
        self.side = side or len(self._decoded(self._paths[0]))
        self._load: Callable[[str], NDArray[np.uint8]] = self._checked if side is None else self._cropped

    @cached_property
    def digest(self) -> str:
        """Hash of all paths in the folder and of the files' hashes."""
        with threads(0) as pool:
            hashes = pool.map(lambda path: uri.sha256(self._bytes(path)), self._paths)
            return json_digest([[f"/{image.path}", sha256] for image, sha256 in zip(self._images, hashes, strict=True)])

    def batches(self, size: int, ranges: Sequence[range] | None = None) -> Batches:
        """See `ImageSet.batches`."""
        with threads(cores()) as pool:
            for rows in batch_ranges(size, or_all(self, ranges)):
                yield np.stack(list(pool.map(self._load, self._paths[rows.start : rows.stop])))

    def _bytes(self, path: str) -> bytes:
        try:
            return bytes(self._fs.cat_file(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error})") from error

    def _decoded(self, path: str) -> NDArray[np.uint8]:
        try:
            return np.asarray(transforms.decode(self._bytes(path)))
        except transforms.UnreadableImage as error:
            raise InputError(f"{path}: {error}; repair or remove it") from error

    def _checked(self, path: str) -> NDArray[np.uint8]:
        pixels = self._decoded(path)
        if pixels.shape != (self.side, self.side, 3):
            size = f"{pixels.shape[1]}x{pixels.shape[0]} pixels"
            raise InputError(f"{path}: {size}; all samples must be squares of one size, here {self.side}x{self.side}")
        return pixels

    def _cropped(self, path: str) -> NDArray[np.uint8]:
        try:
            return transforms.load(self._bytes(path), self.side)
        except transforms.UnreadableImage as error:
            raise InputError(f"{path}: {error}; repair or remove it") from error


def _listed(url: str) -> list[Found]:
    images = open_images(url) if uri.is_folder(url) else []
    if not images:
        raise InputError(f"{uri.redact(url)}: neither a folder of images nor the output of a stage")
    large = next((image for image in images if image.size > MAX_BYTES), None)
    if large is not None:
        raise InputError(f"{large.location}: {large.size:,} bytes, more than {MAX_BYTES:,}; remove it")
    return images


def or_all(images: ImageSet, ranges: Sequence[range] | None) -> Sequence[range]:
    """The ranges, or one of all images."""
    return [range(images.count)] if ranges is None else ranges


def batch_ranges(size: int, ranges: Sequence[range]) -> Iterator[range]:
    """The ranges in pieces of at most ``size``."""
    for part in ranges:
        for first in range(0, len(part), size):
            yield part[first : first + size]
