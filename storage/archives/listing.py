"""What all archives have in common: files with labels, in a fixed order, each read on its own.

Names come from outside. They name images in lists and errors, and never a path on a disk.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from storage.errors import InputError, StorageError
from storage.manifest import json_digest

MAX_BYTES = 1 << 28
"""Bytes that one image file may have."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Member:
    """A file that should be an image."""

    name: str
    """The class and the path below it, with forward slashes."""
    label: int
    """Position of its class among the class names."""
    size: int | None
    """Bytes; None where nothing but reading the file would tell."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file before it has a label."""

    class_name: str
    path: str
    """Below its class."""
    size: int | None
    """Bytes, if known."""
    place: Any
    """Where it lies, for the function that fetches it."""

    @property
    def name(self) -> str:
        """The class and the path below it."""
        return f"{self.class_name}/{self.path}"


class Archive:
    """Labelled files in a fixed order.

    Attributes:
        class_names: sorted names of the classes; a label is a position here.
        members: all files, sorted by name.
        digest: the sha256 of class names, file names and sizes: the same wherever, whenever and in
            whatever form the files lie, if the form tells their sizes.

    Args:
        where: the archive in errors.
        found: the files, in any order.
        fetch: the bytes at a place; OSError or ValueError when there are none.
        class_names: the classes to label by, of which some may be missing; by default those found.
        sealed: JSON that enters the digest where sizes are not known.

    Raises:
        InputError: no files, two of one name, one too large, a name that no text can hold, or a
            class that is not among class_names.
    """

    def __init__(
        self,
        where: str,
        found: Iterable[Found],
        fetch: Callable[[Any], bytes],
        class_names: tuple[str, ...] | None = None,
        sealed: Any = None,
    ) -> None:
        files = sorted(found, key=lambda file: file.name)
        names = sorted({file.class_name for file in files})
        self.class_names = tuple(names) if class_names is None else class_names
        labels = {name: label for label, name in enumerate(self.class_names)}
        _check(where, files, names, labels)
        self.members = tuple(Member(file.name, labels[file.class_name], file.size) for file in files)
        listing = [[member.name, member.size] for member in self.members]
        identity = {"class_names": self.class_names, "members": listing}
        self.digest = json_digest(identity if sealed is None else identity | {"sealed": sealed})
        self._where, self._fetch = where, fetch
        self._places = {file.name: file.place for file in files}

    def read(self, member: Member) -> bytes:
        """The file's bytes.

        Raises:
            StorageError: it is gone, cannot be read, or has another size than when it was listed.
        """
        where = f"{self._where}/{member.name}"
        try:
            data = self._fetch(self._places[member.name])
        except (OSError, ValueError) as error:
            raise StorageError(f"{where}: cannot be read ({first_line(error)})") from error
        if member.size is not None and len(data) != member.size:
            raise StorageError(f"{where}: has {len(data):,} bytes instead of {member.size:,}; it has changed")
        return data


def path_parts(where: str, name: str) -> list[str]:
    """The folders and the file of a name inside a container; empty for a hidden one.

    Raises:
        InputError: the name is absolute or leads upwards.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or "\\" in name or ".." in parts:
        raise InputError(f"{where}: holds a file {name!a}, a name that leads elsewhere; pack it again without")
    return [] if any(part.startswith(".") for part in parts) else parts


def numbered(texts: Collection[str], known: tuple[str, ...] | None) -> dict[str, str]:
    """Class names for labels that may be numbers: padded with zeros, so that their order is the numbers'.

    Args:
        texts: the labels.
        known: the classes to label by, if given; a number is the one of these that it is written as.
    """
    if not all(_NUMBER.fullmatch(text) for text in texts):
        return {text: text for text in texts}
    width = max((len(str(int(text))) for text in texts), default=0)
    names = {int(name): name for name in known or () if _NUMBER.fullmatch(name)}
    return {text: names.get(int(text), str(int(text)).zfill(width)) for text in texts}


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error) or type(error).__name__).partition("\n")[0][:300]


def _check(where: str, files: list[Found], names: list[str], labels: dict[str, int]) -> None:
    if not files:
        raise InputError(f"{where}: no images in it; put each class's images in a folder of its own")
    unknown = [name for name in names if name not in labels]
    if unknown:
        known = f"the {len(labels)} classes to train on"
        raise InputError(f"{where}: class {unknown[0]!r} is none of {known}; rename or remove it")
    for file in files:
        if file.size is not None and file.size > MAX_BYTES:
            raise InputError(f"{where}/{file.name}: {file.size:,} bytes, more than {MAX_BYTES:,}; remove it")
        if _CONTROL.search(file.name) or not _is_text(file.name):
            raise InputError(f"{where}/{file.name!a}: a file name that is not UTF-8; rename it")
    twice = next((one.name for one, other in pairwise(files) if one.name == other.name), None)
    if twice is not None:
        raise InputError(f"{where}/{twice}: there are two of that name; rename or remove one")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
