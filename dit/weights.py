"""Weights files that others made: read whole, hashed, and compared with the hash that is expected."""

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
"""What a URL of a weights file ends in; any other is a folder's."""


HINT: Final = "name the place of the weights file"
_HASHES: Final[dict[str, tuple[dict[str, str], str]]] = {}
"""By URL the version of a file that was hashed, as `uri.version`, and its sha256."""


def read_weights(url: str, expected: str | None, hint: str = HINT) -> tuple[bytes, str]:
    """The bytes of a weights file and their sha256, which a process computes once for each version of the file.

    Args:
        url: the file, by path or fsspec URL.
        expected: the sha256 that the file must have, or None to take it as it is.
        hint: what to do if there is no such file.

    Raises:
        InputError: there is no such file, or its hash is another.
    """
    try:
        version, data = uri.version(url), uri.read(url)
    except StorageError as error:
        raise InputError(f"{error}; {hint}") from error
    return data, _checked(url, _hashed(url, version, lambda: uri.sha256(data)), expected)


def weights_hash(url: str, expected: str | None, hint: str = HINT) -> str:
    """The sha256 of a weights file, which may be larger than the memory. Arguments and errors as `read_weights`."""
    try:
        found = _hashed(url, uri.version(url), lambda: uri.file_sha256(url))
    except StorageError as error:
        raise InputError(f"{error}; {hint}") from error
    return _checked(url, found, expected)


def _hashed(url: str, version: dict[str, str] | None, compute: Callable[[], str]) -> str:
    """The sha256 of a file, computed if it is not known of this version, which the file had before it was read."""
    known = _HASHES.get(url)
    if version and known and known[0] == version == uri.version(url):
        return known[1]
    found = compute()
    if version and version == uri.version(url):  # else it was written meanwhile
        _HASHES[url] = version, found
    return found


@dataclass(frozen=True)
class WeightsFile:
    """A weights file by the name it is published under."""

    name: str
    title: str
    """Of the network that it holds, for errors."""
    hint: str
    """Which file is meant, for whom it is missing."""

    def url(self, location: str) -> str:
        """The file at a location, which is its own URL or that of the folder that it lies in."""
        return location if uri.redact(location).endswith(SUFFIXES) else uri.join(location, self.name)

    def sha256(self, location: str, expected: str | None) -> str:
        """The hash of the file; the network is not built.

        Args:
            location: the file or its folder, by path or fsspec URL.
            expected: the sha256 that the file must have, or None to take it as it is.

        Raises:
            InputError: there is no such file, or its hash is another.
        """
        return weights_hash(self.url(location), expected, self.hint)

    def load(
        self, location: str, expected: str | None, build: Callable[[dict[str, Tensor]], Network]
    ) -> tuple[Network, str]:
        """The network with the weights of the file, frozen, in float32 on the CPU, and the file's sha256.

        Args:
            location: as in `sha256`; the file is a safetensors one, or one that torch saved.
            expected: as in `sha256`.
            build: makes the network without its weights, from which it takes its shape.

        Raises:
            InputError: the file is missing, has another hash, or holds other weights.
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
