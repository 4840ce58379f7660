"""What weights cannot say: recorded in the metadata of the safetensors files that we write, or told by the user."""

from collections.abc import Mapping
from math import isfinite, nan
from typing import Annotated, Final

from pydantic import Field, ValidationError

from dit.convert.files import Option, read_content
from dit.convert.pretrained import is_plain
from dit.convert.process import Found
from storage import uri
from storage.channels import ChannelScale
from storage.config import Config, problem
from storage.errors import InputError, StorageError

KEY: Final = "ditflow"
"""Name of the record in the metadata."""


class Record(Config):
    """What a file records beside its weights."""

    process: Annotated[Found, Field(discriminator="kind")]
    """The process that it was trained for."""
    class_names: tuple[str, ...] | None = None
    """Names of its classes; None if they are not known."""
    channels: ChannelScale | None = None
    """Statistics that each channel of its latents was normalised by; None for the autoencoder's scale."""


def recorded(options: Mapping[str, Option], where: str) -> Record | None:
    """The record in a file's metadata; None if there is none.

    Raises:
        InputError: it is damaged.
    """
    if KEY not in options:
        return None
    try:
        return Record.model_validate_json(str(options[KEY]))
    except ValidationError as error:
        raise InputError(f"{where}: {KEY} in its metadata is not a record of ours: {problem(error)}") from error


def check_count(names: tuple[str, ...] | None, classes: int, where: str) -> None:
    """Check that there is a name for each class.

    Raises:
        InputError: there are more or fewer, or two are the same.
    """
    if names is not None and len(names) != classes:
        raise InputError(f"{where}: has the names of {len(names)} classes, and the model has {classes}")
    if names is not None and len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise InputError(f"{where}: names two classes {twice!r}")


def told_names(location: str) -> tuple[str, ...]:
    """The names of classes in a text file, one a line in the order of the labels.

    Raises:
        InputError: there is no such file, or it is no text.
    """
    try:
        text = uri.read(location, uri.MAX_TEXT).decode()
    except StorageError as error:
        raise InputError(f"--class-names: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--class-names: {uri.redact(location)} is no text in UTF-8") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def told_statistics(location: str, channels: int) -> ChannelScale:
    """The mean and deviation of each latent channel, in a file with tensors ``mean`` and ``std``, as LightningDiT has.

    Raises:
        InputError: there is no such file, or it holds other numbers.
    """
    where, tensors = uri.redact(location), read_content(location).tensors
    numbers = {
        name: tensor.double().flatten().tolist()
        for name, tensor in tensors.items()
        if is_plain(tensor) and tensor.is_floating_point() and tensor.numel() == channels
    }
    for name in ("mean", "std"):
        if not all(map(isfinite, numbers.get(name, [nan]))):
            raise InputError(f"{where}: needs tensors mean and std, each with a number for {channels} latent channels")
    return ChannelScale(mean=tuple(numbers["mean"]), deviation=tuple(numbers["std"]))


def check_scale(scale: ChannelScale | None, channels: int, where: str) -> None:
    """Check that there are a mean and a deviation for each latent channel.

    Raises:
        InputError: there are more or fewer, or a deviation is not above 0.
    """
    if scale is None:
        return
    if (len(scale.mean), len(scale.deviation)) != (channels, channels):
        raise InputError(f"{where}: has the statistics of {len(scale.mean)} latent channels, not of {channels}")
    if min(scale.deviation) <= 0:
        raise InputError(f"{where}: a std is not above 0")
