"""Samples and reference statistics in the npz files of ADM's evaluation suite.

The keys: ``arr_0`` holds images and ``arr_1`` their labels, ``mu`` and ``sigma`` the statistics of
Inception's pooled features, ``mu_s`` and ``sigma_s`` those of its spatial ones. A file comes from outside:
nothing is unpickled, and shapes are looked at before anything is unpacked. Images are streamed, since
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
from dit.metrics.sets import Batches, cut, whole
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
        InputError: it is missing or is no npz, or holds neither images nor statistics of a usable shape.
    """

    def __init__(self, url: str) -> None:
        self._url, self.where = url, uri.redact(url)
        with self._opened() as archive:
            self.names = {name.removesuffix(".npy") for name in archive.namelist()}
        self.has_images = IMAGES in self.names
        self.has_statistics = {"mu", "sigma"} <= self.names
        if not (self.has_images or self.has_statistics):
            raise InputError(f"{self.where}: holds neither images (arr_0) nor statistics (mu and sigma)")

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
            raise InputError(f"{self.where}: holds no images (arr_0), only {', '.join(sorted(self.names))}")
        with self.array(IMAGES) as (_, shape, dtype, fortran):
            fits = len(shape) == 4 and shape[1:] == (shape[1], shape[1], 3) and dtype == np.uint8 and not fortran
            if not fits or not 1 <= shape[1] <= MAX_SIDE or not shape[0]:
                raise InputError(
                    f"{self.where}: arr_0 is {dtype} {shape}, not images uint8 (N, H, H, 3) of at most {MAX_SIDE} px"
                )
        return NpzImages(self, shape[0], shape[1])

    def statistics(self, layer: str) -> Statistics | None:
        """The statistics of ``features`` or ``spatial`` ones; None if there are none.

        The file does not tell of how many images they are: their count is 2, the least that has a covariance.

        Raises:
            InputError: they are no mean (D,) and covariance (D, D), or not finite.
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
        """An array's bytes, none of them read yet, its shape and dtype, and whether the first index is the fastest."""
        with self._opened() as archive, archive.open(f"{name}.npy") as file:
            shape, fortran, dtype = self._header(file, name)
            yield file, shape, dtype, fortran

    def read(self, file: IO[bytes], size: int) -> bytes:
        """So many bytes of an array, neither more nor fewer."""
        data = file.read(size)
        if len(data) != size:
            raise InputError(f"{self.where}: is cut off; fetch it again")
        return data

    def _header(self, file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise InputError(f"{self.where}: {name} is in format {version} of npy, which is not read; save it again")
        return read(file, max_header_size=MAX_HEADER)

    def _floats(self, name: str) -> NDArray[np.float64]:
        with self.array(name) as (file, shape, dtype, fortran):
            if dtype.kind != "f" or len(shape) > 2 or max(shape, default=0) > MAX_DIMS:
                raise InputError(f"{self.where}: {name} is {dtype} {shape}, not floats of at most {MAX_DIMS} features")
            found = np.frombuffer(self.read(file, prod(shape) * dtype.itemsize), dtype).astype(np.float64)
        if not np.isfinite(found).all():
            raise InputError(f"{self.where}: {name} is not finite; fetch it again")
        return found.reshape(shape, order="F" if fortran else "C")

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        fs, path = uri.filesystem(self._url)
        try:
            with fs.open(path, "rb") as file, zipfile.ZipFile(file) as archive:
                yield archive
        except FileNotFoundError as error:
            raise InputError(f"{self.where}: no such file") from error
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.where}: not a whole npz file ({error})") from error


def write(url: str, images: Batches, labels: NDArray[np.int64], side: int) -> None:
    """Write images and their labels as ADM does: ``arr_0`` and ``arr_1``, neither compressed.

    Args:
        url: the file, by path or fsspec URL; it is replaced if it is there.
        images: one of (H, H, 3) for each label, a batch in memory at a time.
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

    def batches(self, size: int, stretches: Sequence[range] | None = None) -> Batches:
        """As `dit.metrics.sets.ImageSet.batches`; reads what lies between the stretches too."""
        one, at = self.side**2 * 3, 0
        with self._file.array(IMAGES) as (file, *_):
            for rows in cut(size, whole(self, stretches)):
                for _ in range(at, rows.start):
                    self._file.read(file, one)
                data = self._file.read(file, len(rows) * one)
                yield np.frombuffer(bytearray(data), np.uint8).reshape(-1, self.side, self.side, 3)
                at = rows.stop
