"""What weights cannot say: recorded in the metadata of the safetensors files that we write, or told by the user."""

from collections.abc import Mapping
from typing import Annotated, Final

from pydantic import Field, ValidationError

from dit.convert.files import Option
from dit.convert.process import Found
from storage import uri
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
