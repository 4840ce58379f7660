"""Weights files that others made: read whole, hashed, and compared with the hash that is expected."""

import io
from collections.abc import Callable
from typing import TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from storage import uri
from storage.errors import InputError, StorageError

Network = TypeVar("Network", bound=nn.Module)


def read_weights(url: str, expected: str | None) -> tuple[bytes, str]:
    """The bytes of a weights file and their sha256.

    Args:
        url: the file, by path or fsspec URL.
        expected: the sha256 that the file must have, or None to take it as it is.

    Raises:
        InputError: there is no such file, or its hash is another.
    """
    try:
        data = uri.read(url)
    except StorageError as error:
        raise InputError(f"{error}; name the place of the weights file") from error
    found = uri.sha256(data)
    if expected is not None and found != expected.lower():
        raise InputError(
            f"{uri.redact(url)}: its sha256 is {found}, not the expected {expected}; fetch it again or correct sha256"
        )
    return data, found


def read_network(
    url: str, expected: str | None, shaped: Callable[[dict[str, Tensor]], Network], *, title: str, hint: str
) -> tuple[Network, str]:
    """A network with the weights of a file, frozen, in float32 on the CPU, and the file's sha256.

    Args:
        url: a ``.safetensors`` file, or one that torch saved, by path or fsspec URL.
        expected: as in `read_weights`.
        shaped: makes the network without its weights, which it is given for their shapes.
        title: what the network is called.
        hint: which file is meant, for whom it is not there.

    Raises:
        InputError: the file is missing, has another hash, or holds other weights.
    """
    try:
        data, found = read_weights(url, expected)
    except InputError as error:
        raise InputError(f"{error}; {hint}") from error
    try:
        state = _tensors(data, url)
        with torch.device("meta"):
            network = shaped(state)
        network.load_state_dict(state, assign=True)
    except Exception as error:  # torch promises no exception types for what it cannot read
        reason = one_line(error).rstrip(":")
        raise InputError(f"{uri.redact(url)}: not the weights of {title} ({reason})") from error
    return network.requires_grad_(False).eval(), found


def _tensors(data: bytes, url: str) -> dict[str, Tensor]:
    if url.endswith(".safetensors"):
        state = safetensors.torch.load(data)
    else:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def one_line(error: Exception) -> str:
    """What a library complains about, cut to its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
