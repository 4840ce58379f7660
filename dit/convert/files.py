"""Files of checkpoints: their tensors and options by name."""

import io
import json
import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from safetensors import safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from torch import Tensor

from dit.weights import refuse_stand_in, unpickled
from storage import uri
from storage.errors import InputError, StorageError, one_line

SAFETENSORS: Final = ".safetensors"
PICKLES: Final = (".pt", ".pth", ".ckpt", ".bin")
SHARD: Final = re.compile(r"-\d+-of-(?!0*1\.)\d+\.\w+$|(optim_states|__\d+_\d+)\.\w+$")

Option = str | int | float | bool


@dataclass(frozen=True)
class Content:
    """What a file holds. Names of nested entries are joined by dots."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Option] = field(default_factory=dict)
    """Plain values: what the training script or the file's metadata says."""


def suffix(url: str) -> str:
    """The suffix of a URL's last part, in lower case."""
    return PurePosixPath(uri.redact(url)).suffix.lower()


def read_content(url: str) -> Content:
    """The content of a safetensors file or a pickle, on the CPU.

    Raises:
        InputError: there is no such file, it is damaged, a shard, or contains objects that are not loaded.
    """
    local, where = uri.local_path(url), uri.redact(url)
    if SHARD.search(where):
        raise InputError(f"{where}: is one shard of a checkpoint; save the whole model's state_dict in one file")
    try:
        refuse_stand_in(url)
        return _of_bytes(uri.read(url), where) if local is None else _of_file(local, where)
    except (InputError, StorageError) as error:
        raise InputError(str(error)) from error
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such file") from error
    except Exception as error:  # safetensors, torch and stores promise no exception types
        raise InputError(f"{where}: cannot be read ({one_line(error)}); it may be damaged, fetch it again") from error


def _of_file(path: Path, where: str) -> Content:
    with path.open("rb") as file:
        head = file.read(9)
    if not _is_safetensors(head):  # mapped, as only a part of a training checkpoint is needed
        return flat(unpickled(str(path), where, mmap=zipfile.is_zipfile(path)))
    with safe_open(path, "pt") as file:
        return Content(dict(load_file(path)), dict(file.metadata() or {}))


def _of_bytes(data: bytes, where: str) -> Content:
    if not _is_safetensors(data):
        return flat(unpickled(io.BytesIO(data), where))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return Content(dict(load_bytes(data)), header.get("__metadata__", {}))


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of its JSON header and the header."""
    return head[8:9] == b"{"


def flat(content: Any) -> Content:
    """The tensors and plain values in nested mappings and `argparse.Namespace`. Other objects are passed over."""
    found, seen, left = Content(), set[int](), [("", content)]
    while left:
        name, value = left.pop()
        entries = vars(value) if isinstance(value, Namespace) else value
        if isinstance(entries, Mapping) and id(entries) not in seen:
            seen.add(id(entries))
            named = [(f"{name}.{key}" if name else key, item) for key, item in entries.items() if isinstance(key, str)]
            left += reversed(named)
        elif isinstance(value, Tensor):
            found.tensors[name] = value
        elif isinstance(value, Option):
            found.options[name] = value
    return found
