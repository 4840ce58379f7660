"""Weights files of other projects: read, hashed, and compared with the expected hash."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from storage import uri
from storage.errors import InputError, StorageError, one_line

Network = TypeVar("Network", bound=nn.Module)
SUFFIXES: Final = (".safetensors", ".pth", ".pt")
"""Endings of weights files. A URL with another ending is a folder."""
HINT: Final = "check the location of the weights file"
_HASHES: Final[dict[str, tuple[dict[str, str], str]]] = {}
"""For each URL, the version of the hashed file (see `uri.version`) and its sha256."""


def read_weights(url: str, expected: str | None, hint: str = HINT) -> tuple[bytes, str]:
    """The bytes of a weights file and their sha256. A process hashes each version of a file once.

    Args:
        url: the file, by path or fsspec URL.
        expected: the sha256 that the file must have; None accepts any file.
        hint: what to do if the file is missing, for the error.

    Raises:
        InputError: the file is missing, or has another hash.
    """
    try:
        version, data = uri.version(url), uri.read(url)
    except StorageError as error:
        raise InputError(f"{error}; {hint}") from error
    _refuse_stand_in(url)
    return data, _checked(url, _hashed(url, version, lambda: uri.sha256(data)), expected)


def weights_hash(url: str, expected: str | None, hint: str = HINT) -> str:
    """The sha256 of a weights file, read piece by piece. Arguments and errors as `read_weights`."""
    try:
        sha256 = _hashed(url, uri.version(url), lambda: uri.file_sha256(url))
    except StorageError as error:
        raise InputError(f"{error}; {hint}") from error
    _refuse_stand_in(url)
    return _checked(url, sha256, expected)


def _hashed(url: str, version: dict[str, str] | None, compute: Callable[[], str]) -> str:
    """The sha256 of a file, computed unless it is known of this version. ``version`` is that from before reading."""
    known = _HASHES.get(url)
    if version and known and known[0] == version == uri.version(url):
        return known[1]
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


def _refuse_stand_in(url: str) -> None:
    if (instead := uri.stand_in(url)) is not None:
        raise InputError(f"{uri.redact(url)}: {instead}")


def _checked(url: str, sha256: str, expected: str | None) -> str:
    if expected is not None and sha256 != expected.lower():
        raise InputError(
            f"{uri.redact(url)}: its sha256 is {sha256}, not the expected {expected}; fetch it again or correct sha256"
        )
    return sha256


def _tensors(data: bytes, url: str) -> dict[str, Tensor]:
    if url.endswith(".safetensors"):
        state = safetensors.torch.load(data)
    else:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
