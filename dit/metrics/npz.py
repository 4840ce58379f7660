"""Samples and reference statistics in the npz files of ADM's evaluation suite.

The keys: ``arr_0`` holds images and ``arr_1`` their labels, ``mu`` and ``sigma`` the statistics of
Inception's pooled features, ``mu_s`` and ``sigma_s`` those of its spatial ones. A file is not trusted:
nothing is unpickled, and shapes are checked before anything is unpacked. Images are streamed, since
50,000 of 256 px are 9.8 GB.
"""

# B = batch, H = image side, D = features

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import prod
from typing import IO, Any, Final

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray

from dit.metrics.frechet import Statistics
from dit.metrics.sets import Batches, batch_ranges, or_all
from storage import uri
from storage.errors import InputError

IMAGES: Final = "arr_0"
LABELS: Final = "arr_1"
STATISTICS: Final = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
MAX_SIDE: Final = 1024
MAX_DIMS: Final = 8192
MAX_HEADER: Final = 10_000


class Npz:
    """A file of arrays, by path or fsspec URL.

    Raises:
        InputError: it is missing or no npz file, or has neither images nor statistics.
    """

    def __init__(self, url: str) -> None:
        self._url, self.where = url, uri.redact(url)
        with self._opened() as archive:
            self.names = {name.removesuffix(".npy") for name in archive.namelist()}
        self.has_images = IMAGES in self.names
        self.has_statistics = {"mu", "sigma"} <= self.names
        if not (self.has_images or self.has_statistics):
            raise InputError(f"{self.where}: has neither images (arr_0) nor statistics (mu and sigma)")

    @cached_property
    def digest(self) -> str:
        """The sha256 of the file."""
        return uri.file_sha256(self._url)

    def images(self) -> "NpzImages":
        """The images.

        Raises:
            InputError: there are none, or they are not uint8 (N, H, H, 3).
        """
        if not self.has_images:
            raise InputError(f"{self.where}: has no images (arr_0), only {', '.join(sorted(self.names))}")
        with self.array(IMAGES) as (_, shape, dtype, fortran):
            fits = len(shape) == 4 and shape[1:] == (shape[1], shape[1], 3) and dtype == np.uint8 and not fortran
            if not fits or not 1 <= shape[1] <= MAX_SIDE or not shape[0]:
                raise InputError(
                    f"{self.where}: arr_0 is {dtype} {shape}, not images uint8 (N, H, H, 3) of at most {MAX_SIDE} px"
                )
        return NpzImages(self, shape[0], shape[1])

    def statistics(self, layer: str) -> Statistics | None:
        """The statistics of ``features`` or ``spatial`` ones; None if there are none.

        The file does not record the number of images. It is set to 2, the fewest that have a covariance.

        Raises:
            InputError: they are not a mean (D,) and a covariance (D, D), or not finite.
        """
        names = STATISTICS[layer]
        if not set(names) <= self.names:
            return None
        mean, covariance = (torch.from_numpy(self._floats(name)) for name in names)
        if covariance.shape != (*mean.shape, *mean.shape) or mean.ndim != 1:
            shapes = f"of {tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise InputError(f"{self.where}: {' and '.join(names)} are {shapes}, not a mean and a covariance")
        return Statistics(2, mean, covariance)

    @contextmanager
    def array(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any], bool]]:
        """Opens an array: its bytes, shape, dtype, and whether it is in Fortran order."""
        with self._opened() as archive, archive.open(f"{name}.npy") as file:
            shape, fortran, dtype = self._header(file, name)
            yield file, shape, dtype, fortran

    def read(self, file: IO[bytes], size: int) -> bytes:
        """The next ``size`` bytes of an array, all of them."""
        data = file.read(size)
        if len(data) != size:
            raise InputError(f"{self.where}: truncated file; fetch it again")
        return data

    def _header(self, file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise InputError(f"{self.where}: {name} has npy format {version}, which is not supported; save it again")
        return read(file, max_header_size=MAX_HEADER)

    def _floats(self, name: str) -> NDArray[np.float64]:
        with self.array(name) as (file, shape, dtype, fortran):
            if dtype.kind != "f" or len(shape) > 2 or max(shape, default=0) > MAX_DIMS:
                raise InputError(f"{self.where}: {name} is {dtype} {shape}, not floats of at most {MAX_DIMS} features")
            values = np.frombuffer(self.read(file, prod(shape) * dtype.itemsize), dtype).astype(np.float64)
        if not np.isfinite(values).all():
            raise InputError(f"{self.where}: {name} is not finite; fetch it again")
        return values.reshape(shape, order="F" if fortran else "C")

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        fs, path = uri.filesystem(self._url)
        try:
            with fs.open(path, "rb") as file, zipfile.ZipFile(file) as archive:
                yield archive
        except FileNotFoundError as error:
            raise InputError(f"{self.where}: no such file") from error
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, RuntimeError) as error:
            damage = uri.stand_in(self._url) or f"not a complete npz file ({error}); fetch it again"
            raise InputError(f"{self.where}: {damage}") from error


def write(url: str, images: Batches, labels: NDArray[np.int64], side: int) -> None:
    """Write images and their labels as ADM does: ``arr_0`` and ``arr_1``, neither compressed.

    Args:
        url: the file, by path or fsspec URL; an existing file is replaced.
        images: batches (B, H, H, 3), as many images as labels; one batch is in memory at a time.
        labels: (N,).
        side: H.

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), side, side, 3)}
    with uri.writing(url, len(labels) * side**2 * 3) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as array:
            npy.write_array_header_1_0(array, header)
            for batch in images:
                array.write(batch.tobytes())
        with archive.open(f"{LABELS}.npy", "w") as array:
            npy.write_array(array, labels)


class NpzImages:
    """The images of a file, as a `dit.metrics.sets.ImageSet`."""

    crop = "none"

    def __init__(self, file: Npz, count: int, side: int) -> None:
        self._file, self.count, self.side = file, count, side

    @property
    def digest(self) -> str:
        """The sha256 of the file."""
        return self._file.digest

    def batches(self, size: int, ranges: Sequence[range] | None = None) -> Batches:
        """See `dit.metrics.sets.ImageSet.batches`. The images between the ranges are read too."""
        image_bytes, position = self.side**2 * 3, 0
        with self._file.array(IMAGES) as (file, *_):
            for rows in batch_ranges(size, or_all(self, ranges)):
                for _ in range(position, rows.start):
                    self._file.read(file, image_bytes)
                data = self._file.read(file, len(rows) * image_bytes)
                yield np.frombuffer(bytearray(data), np.uint8).reshape(-1, self.side, self.side, 3)
                position = rows.stop
