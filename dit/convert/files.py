"""Files of tensors. Pickles are read by torch's restricted unpickler, which runs no code from them."""

import argparse
import io
import pickle
import zipfile
from pathlib import PurePosixPath
from typing import Any, Final

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from torch import Tensor

from storage import uri
from storage.errors import InputError, StorageError, one_line

SAFETENSORS: Final = ".safetensors"
PICKLES: Final = (".pt", ".pth", ".ckpt", ".bin")


def suffix(url: str) -> str:
    """The suffix of a URL's last part."""
    return PurePosixPath(uri.redact(url)).suffix


def read_tensors(url: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or a pickle, on the CPU; in a pickle bare, or under "ema" or "model".

    Raises:
        InputError: there is no such file, it is damaged, or it contains other objects than tensors.
    """
    local, where = uri.local_path(url), uri.redact(url)
    if (instead := uri.stand_in(url)) is not None:
        raise InputError(f"{where}: {instead}")
    try:
        if suffix(url) == SAFETENSORS:
            return dict(load_bytes(uri.read(url)) if local is None else load_file(local))
        return _weights(_unpickled(io.BytesIO(uri.read(url)) if local is None else str(local)), where)
    except (InputError, StorageError) as error:
        raise InputError(str(error)) from error
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such file") from error
    except pickle.UnpicklingError as error:
        raise InputError(f"{where}: damaged, or contains objects besides tensors, which are not loaded") from error
    except Exception as error:  # safetensors, torch and stores promise no exception types
        raise InputError(f"{where}: cannot be read ({one_line(error)})") from error


def _unpickled(file: str | io.BytesIO) -> Any:
    lazily = isinstance(file, str) and zipfile.is_zipfile(file)  # only a part of a training checkpoint is needed
    with torch.serialization.safe_globals([argparse.Namespace]):  # the published code adds its options
        return torch.load(file, map_location="cpu", weights_only=True, mmap=lazily or None)


def _weights(content: Any, where: str) -> dict[str, Tensor]:
    for key in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise InputError(f"{where}: contains no tensors by name, nor any under 'ema' or 'model'")
    return dict(content)
