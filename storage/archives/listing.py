"""The interface of all archives: labelled files in a fixed order, each readable on its own.

File names in an archive are untrusted. They appear in lists and errors, but never become paths on a disk.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import Any

from storage.archives.account import Account, is_document_name
from storage.errors import InputError, StorageError
from storage.magic import begins_as_image
from storage.seal import canonical

MAX_BYTES = 1 << 28
"""Largest image file, bytes."""

_PIECE = 4096  # files that are put into one text
_TRIED = 16  # files of a class that are looked into if all are named as documents
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Member:
    """A file of an archive, which should be an image."""

    name: str
    """Class name and path below the class, with forward slashes."""
    label: int
    """Index of its class among the class names."""
    size: int | None
    """Bytes; None if only reading the file would tell."""
    location: Any = field(default=None, compare=False, repr=False)
    """Location of its bytes, for the archive."""


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file of an archive before its label is known."""

    class_name: str
    path: str
    """Path below the class."""
    size: int | None
    """Bytes, if known."""
    location: Any
    """Location of its bytes, for the archive's fetch function."""

    @property
    def name(self) -> str:
        """Class name and path below the class."""
        return f"{self.class_name}/{self.path}"


class Archive:
    """Labelled files in a fixed order.

    Attributes:
        class_names: sorted names of the classes; a label is an index into them.
        members: all files, sorted by name.
        digest: SHA-256 of class names, file names and file sizes, 64 hex digits. It does not depend on
            location, time or type of the archive, except for types that do not give file sizes.
        account: what else is in the archive, and how it was understood.
        seconds: how long listing took, with all that tells which files are images.

    Args:
        account: of the archive, with its URL and what is passed over once all files are taken.
        files: the files, in any order.
        fetch: returns the bytes at a location; raises OSError or ValueError if it cannot.
        class_names: the classes to label by, some of which may have no files; by default those of the files.
        content: JSON value that enters the digest in place of file sizes that are not known.

    Raises:
        InputError: there are no files, two have the same name, one is too large, a name is not
            printable text, two class names differ in case or Unicode form alone, or a class has only files
            named as documents that are no images, or is not among class_names.
        StorageError: such a file cannot be read.
    """

    def __init__(
        self,
        account: Account,
        files: Iterable[ListedFile],
        fetch: Callable[[Any], bytes],
        class_names: tuple[str, ...] | None = None,
        content: Any = None,
    ) -> None:
        where = account.where
        named = sorted(((file.name, file) for file in files), key=itemgetter(0))
        names = sorted({file.class_name for _, file in named})
        self.class_names = tuple(names) if class_names is None else class_names
        labels = {name: label for label, name in enumerate(self.class_names)}
        _check_classes(where, names, labels)
        self.members = tuple(Member(name, labels[file.class_name], file.size, file.location) for name, file in named)
        _check(where, self.members)
        self.digest = _digest(self.class_names, self.members, content)
        self.account = account.closed()
        self.seconds = 0.0
        self._where, self._fetch = f"{where}/{account.top}".rstrip("/"), fetch
        self._check_documents()

    def _check_documents(self) -> None:
        """Check that no class consists of texts or numbers, as far as names tell, and the first bytes of some files."""
        images = {member.label for member in self.members if not is_document_name(member.name)}
        documents: dict[int, list[Member]] = {}
        for member in self.members:
            if member.label not in images:
                documents.setdefault(member.label, []).append(member)
        for label, members in documents.items():
            if not any(begins_as_image(self.read(member)) for member in members[:_TRIED]):
                problem = f"has no images, only files such as {members[0].name!r}; move them away"
                raise InputError(f"{self._where}: class {self.class_names[label]!r} {problem}")

    def read(self, member: Member) -> bytes:
        """The bytes of a file.

        Raises:
            StorageError: the file is gone, cannot be read, or has changed its size since it was listed.
        """
        where = f"{self._where}/{member.name}"
        try:
            data = self._fetch(member.location)
        except (OSError, ValueError) as error:
            raise StorageError(f"{where}: cannot be read ({first_line(error)})") from error
        if member.size is not None and len(data) != member.size:
            raise StorageError(f"{where}: has {len(data):,} bytes instead of {member.size:,}; it has changed")
        return data


def inside_path(where: str, name: str) -> str:
    """A path inside a tar or zip, without ``.`` and empty parts; empty for the top.

    Raises:
        InputError: the path is absolute, or has a backslash or a part ``..``.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if "\\" in name:
        advice = "pack it again with / between folders, or rename the file"
        raise InputError(f"{where}: the file name {name!a} has a backslash; {advice}")
    if name.startswith("/") or ".." in parts:
        raise InputError(f"{where}: the file name {name!a} is absolute or leads upwards; pack it again without")
    return "/".join(parts)


def class_names_of(labels: Collection[str], known: tuple[str, ...] | None) -> dict[str, str]:
    """The class name of each label as it is written in an archive.

    If all labels are numbers, they are padded with zeros, so that sorting by name sorts by number.

    Args:
        labels: the distinct labels.
        known: the classes to label by, if given; a number takes the name among them with the same value.
    """
    if not all(_NUMBER.fullmatch(label) for label in labels):
        return {label: label for label in labels}
    width = max((len(str(int(label))) for label in labels), default=0)
    names = {int(name): name for name in known or () if _NUMBER.fullmatch(name)}
    return {label: names.get(int(label), str(int(label)).zfill(width)) for label in labels}


def first_line(error: Exception) -> str:
    """The first line of a library's error, or its type if it has no text."""
    return (str(error) or type(error).__name__).partition("\n")[0][:300]


def _check_classes(where: str, names: list[str], labels: dict[str, int]) -> None:
    """Check that there are images, and that the classes of all of them are known."""
    if not names:
        raise InputError(f"{where}: no images; put the images of each class in a folder of its own")
    _check_forms(where, [*labels, *names])
    unknown = [name for name in names if name not in labels]
    if unknown:
        known = f"the {len(labels)} classes to train on"
        raise InputError(f"{where}: class {unknown[0]!r} is not one of {known}; rename or remove it")


def _check(where: str, members: Sequence[Member]) -> None:
    """Check sizes and names of all files."""
    for member in members:
        if member.size is not None and member.size > MAX_BYTES:
            problem = f"{member.size:,} bytes, more than the {MAX_BYTES:,} allowed; remove it"
            raise InputError(f"{where}/{member.name}: {problem}")
        if not _is_text(member.name):
            raise InputError(f"{where}/{member.name!a}: the file name is not printable UTF-8; rename the file")
    duplicate = next((one.name for one, other in pairwise(members) if one.name == other.name), None)
    if duplicate is not None:
        raise InputError(f"{where}/{duplicate}: two files have this name; rename or remove one")


def _check_forms(where: str, names: Iterable[str]) -> None:
    """Check that no two class names are the same but for case or Unicode form. Letters alone may be of either case."""
    forms = dict[str, str]()
    for name in names:
        form = unicodedata.normalize("NFC", name)
        other = forms.setdefault(form if len(form) == 1 else form.casefold(), name)
        if other != name:
            what = (
                "the same text in two Unicode forms"
                if form == unicodedata.normalize("NFC", other)
                else "the same but for case"
            )
            same = f"the class names {other!a} and {name!a} are {what}"
            raise InputError(f"{where}: {same}; rename one of them to the other")


def _is_text(name: str) -> bool:
    """Whether a name has no control characters, and a form in UTF-8."""
    if name.isascii():
        return name.isprintable()
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return not _CONTROL.search(name)


def _digest(class_names: tuple[str, ...], members: Sequence[Member], content: Any) -> str:
    """SHA-256 of the listing as JSON: that of `json_digest`, without the whole text in memory."""
    sha256 = hashlib.sha256(b'{"class_names":%s,"members":[' % canonical(class_names))
    for first in range(0, len(members), _PIECE):
        piece = canonical([[member.name, member.size] for member in members[first : first + _PIECE]])
        sha256.update((b"," if first else b"") + piece[1:-1])
    sha256.update(b"]}" if content is None else b'],"sealed":%s}' % canonical(content))
    return sha256.hexdigest()
