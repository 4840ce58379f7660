"""Weights files of other projects: read, hashed, and compared with the expected hash.

Pickles are read by torch's restricted unpickler, which runs no code from them. Paths and NumPy's objects, which
training scripts save beside the weights, become an `Unread` each; every other object is refused.
"""

import argparse
import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Final, Self, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from storage import uri
from storage.errors import InputError, StorageError, one_line

Network = TypeVar("Network", bound=nn.Module)
SUFFIXES: Final = (".safetensors", ".pth", ".pt", ".onnx")
"""Endings of weights files. A URL with another ending is a folder."""
HINT: Final = "check the location of the weights file"
DIFFUSERS_WEIGHTS: Final = tuple(
    f"diffusion_pytorch_model{variant}" for variant in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
)
"""Names of the weights in a diffusers folder, the preferred one first."""
UNREAD: Final = (
    *(f"{module}.{name}Path" for module in ("pathlib", "pathlib._local") for name in ("Posix", "Windows")),
    *(f"{module}.Pure{name}Path" for module in ("pathlib", "pathlib._local") for name in ("Posix", "Windows")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
)
"""Names in pickles that stand for an `Unread`."""
_HASHES: Final[dict[str, tuple[dict[str, str], str]]] = {}
"""For each URL, the version of the hashed file (see `uri.version`) and its sha256."""


class Unread:
    """An object in a pickle that is neither a weight nor an option. Whatever the pickle gives it is dropped."""

    def __new__(cls, *_: object) -> Self:
        """Drop the arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Drop the state."""


def unpickled(file: str | IO[bytes], where: str, *, mmap: bool = False) -> Any:
    """The content of a pickle that torch saved, with tensors on the CPU. No code from it is run.

    Args:
        file: a local path, or the bytes.
        where: location of the file, for errors.
        mmap: map a file instead of reading it whole; torch cannot map files of its first format.

    Raises:
        InputError: it is damaged, or has objects that are neither tensors, plain values, `argparse.Namespace` nor
            named in `UNREAD`.
    """
    known: list[Any] = [argparse.Namespace, *((Unread, name) for name in UNREAD)]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap or None)
    except pickle.UnpicklingError as error:
        if found := re.search(r"(?<=GLOBAL )\S+|torch\.distributed\.tensor", str(error)):
            raise InputError(f"{where}: contains {_foreign(found[0])}") from error
        other = "not as torch.save writes it with its own pickle protocol; fetch it again, or save the weights so"
        raise InputError(f"{where}: damaged, or {other}") from error
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise
        raise InputError(f"{where}: is a TorchScript archive; save the state_dict of the module") from error


def refuse_stand_in(url: str) -> None:
    """Check that a weights file is not empty, and that nothing else, such as a Git LFS pointer, stands in its place.

    Raises:
        InputError: it is empty, or something else.
        StorageError: it is absent or cannot be read.
    """
    if (instead := uri.stand_in(url)) is not None:
        raise InputError(f"{uri.redact(url)}: {instead}")
    if uri.size(url) == 0:
        raise InputError(f"{uri.redact(url)}: is empty; fetch it again")


def read_weights(url: str, expected: str | None, hint: str = HINT) -> tuple[bytes, str]:
    """The bytes of a weights file and their sha256. A process hashes each version of a file once.

    Args:
        url: the file, by path or fsspec URL.
        expected: the sha256 that the file must have; None accepts any file.
        hint: what to do if the file is missing, for the error.

    Raises:
        InputError: the file is missing or no weights file, or has another hash.
    """
    try:
        version, data = uri.version(url), uri.read(url)
        sha256 = _hashed(url, version, lambda: uri.sha256(data))
    except StorageError as error:
        raise InputError(f"{error}; {hint}") from error
    return data, _checked(url, sha256, expected)


def weights_hash(url: str, expected: str | None, hint: str = HINT) -> str:
    """The sha256 of a weights file, read piece by piece. Arguments and errors as `read_weights`."""
    try:
        sha256 = _hashed(url, uri.version(url), lambda: uri.file_sha256(url))
    except StorageError as error:
        raise InputError(f"{error}; {hint}") from error
    return _checked(url, sha256, expected)


def _hashed(url: str, version: dict[str, str] | None, compute: Callable[[], str]) -> str:
    """The sha256 of a file, computed unless it is known of this version. ``version`` is that from before reading."""
    known = _HASHES.get(url)
    if version and known and known[0] == version == uri.version(url):
        return known[1]
    refuse_stand_in(url)
    sha256 = compute()
    if version and version == uri.version(url):  # else the file changed meanwhile
        _HASHES[url] = version, sha256
    return sha256


@dataclass(frozen=True)
class WeightsFile:
    """A published weights file.

    Args:
        name: name of the file.
        title: name of its network, for errors.
        hint: which file is needed, for the error if it is missing.
    """

    name: str
    title: str
    hint: str

    def url(self, location: str) -> str:
        """URL of the file at a location: of the file itself, or of the folder that contains it."""
        return location if uri.redact(location).endswith(SUFFIXES) else uri.join(location, self.name)

    def sha256(self, location: str, expected: str | None) -> str:
        """The hash of the file. The network is not built.

        Args:
            location: the file or its folder, by path or fsspec URL.
            expected: the sha256 that the file must have; None accepts any file.

        Raises:
            InputError: the file is missing, or has another hash.
        """
        return weights_hash(self.url(location), expected, self.hint)

    def load(
        self, location: str, expected: str | None, build: Callable[[dict[str, Tensor]], Network]
    ) -> tuple[Network, str]:
        """The network with the weights of the file, frozen, in float32 on the CPU, and the file's sha256.

        Args:
            location: as in `sha256`; the file is safetensors, or saved by torch.
            expected: as in `sha256`.
            build: makes the network, whose size it can take from the weights.

        Raises:
            InputError: the file is missing, has another hash, or contains other weights.
        """
        url = self.url(location)
        data, sha256 = read_weights(url, expected, self.hint)
        try:
            state = _tensors(data, uri.redact(url))
            with torch.device("meta"):
                network = build(state)
            network.load_state_dict(state, assign=True)
        except Exception as error:  # torch promises no exception types for what it cannot read
            reason = one_line(error).rstrip(":")
            raise InputError(f"{uri.redact(url)}: not the weights of {self.title} ({reason})") from error
        return network.requires_grad_(False).eval(), sha256


def _foreign(name: str) -> str:
    """Which object of a pickle is not loaded, and what to do."""
    if name.startswith("torch.distributed."):
        return f"{name}, so it is one rank's shard; save the full state_dict of the model"
    save = "torch.save(torch.load('x.pt', weights_only=False)['ema'], 'weights.pt')"
    return f"{name}, which is not loaded, as it could run code; if you trust the file, save its weights alone: {save}"


def _checked(url: str, sha256: str, expected: str | None) -> str:
    if expected is not None and sha256 != expected.lower():
        raise InputError(
            f"{uri.redact(url)}: its sha256 is {sha256}, not the expected {expected}; fetch it again or correct sha256"
        )
    return sha256


def _tensors(data: bytes, url: str) -> dict[str, Tensor]:
    state = safetensors.torch.load(data) if url.endswith(".safetensors") else unpickled(io.BytesIO(data), url)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
