"""Where images come from: a folder of class folders, on any file system.

Other archives (a tar of class tars, a zip, Parquet) fit behind the same protocol.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator

from storage import uri
from storage.config import Config, operational
from storage.errors import InputError, StorageError
from storage.manifest import json_digest


class ArchiveRef(Config):
    """The images to learn from, and those to measure with. What lies there enters a digest by its listing."""

    train: Annotated[str, AfterValidator(uri.without_credentials)] = operational()
    """URL of a folder with one folder of images for each class."""
    held_out: Annotated[str, AfterValidator(uri.without_credentials)] | None = operational(None)
    """URL of a folder of the same kind with images that training never sees; none without."""


@dataclass(frozen=True)
class Member:
    """A file that should be an image."""

    name: str
    """Path below the archive, with forward slashes."""
    label: int
    """Position of its class among the class names."""
    size: int
    """Bytes."""


class Archive(Protocol):
    """Labelled files in a fixed order."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Sorted names of the classes; a label is a position here."""

    @property
    def members(self) -> tuple[Member, ...]:
        """All files, sorted by name."""

    @property
    def digest(self) -> str:
        """The sha256 of class names, file names and sizes: the same wherever and whenever the files lie."""

    def read(self, member: Member) -> bytes:
        """The file's bytes.

        Raises:
            StorageError: it is gone or cannot be read.
        """


class FolderArchive:
    """A folder whose folders are classes; every file inside one counts as an image of that class.

    Names that begin with a dot are passed over. Links are followed to files and class folders, but
    not to folders further down, where they could run in circles.
    """

    def __init__(self, url: str, class_names: tuple[str, ...] | None = None) -> None:
        self._fs, root = uri.filesystem(url)
        self._root = root.rstrip("/")
        self._where = uri.redact(url)
        folders = self._class_folders()
        self.class_names = tuple(sorted(folders)) if class_names is None else class_names
        unknown = sorted(set(folders) - set(self.class_names))
        if unknown:
            known = f"the {len(self.class_names)} classes to train on"
            raise InputError(f"{self._where}: class folder {unknown[0]!r} is none of {known}; rename or remove it")
        labels = {name: label for label, name in enumerate(self.class_names)}
        found = (member for name, path in folders.items() for member in self._members(name, path, labels[name]))
        self.members = tuple(sorted(found, key=lambda member: member.name))
        listing = [[member.name, member.size] for member in self.members]
        self.digest = json_digest({"class_names": self.class_names, "members": listing})

    def read(self, member: Member) -> bytes:
        """The file's bytes.

        Raises:
            StorageError: it is gone or cannot be read.
        """
        try:
            return bytes(self._fs.cat_file(f"{self._root}/{member.name}"))
        except OSError as error:
            raise StorageError(f"{self._where}/{member.name}: cannot be read ({error})") from error

    def _class_folders(self) -> dict[str, str]:
        if not self._fs.exists(self._root):
            raise InputError(f"{self._where}: no such folder of images")
        if not self._fs.isdir(self._root):
            raise InputError(f"{self._where}: not a folder; give one that holds a folder of images for each class")
        folders = {_name(entry): entry["name"] for entry in self._entries(self._root) if entry["type"] == "directory"}
        if not folders:
            raise InputError(f"{self._where}: no class folders in it; put each class's images in a folder of its own")
        return folders

    def _members(self, class_name: str, path: str, label: int) -> list[Member]:
        files = [Member(self._checked(f"{class_name}/{below}"), label, size) for below, size in self._files(path)]
        if not files:
            raise InputError(f"{self._where}/{class_name}: class folder without files; fill it or remove it")
        return files

    def _files(self, path: str, below: str = "") -> Iterator[tuple[str, int]]:
        for entry in self._entries(path):
            if entry["type"] == "file":
                yield below + _name(entry), int(entry["size"])
            elif entry["type"] == "directory" and not entry.get("islink"):
                yield from self._files(entry["name"], f"{below}{_name(entry)}/")

    def _entries(self, path: str) -> list[dict[str, Any]]:
        try:
            listed = self._fs.ls(path, detail=True)
            visible = [entry for entry in listed if not _name(entry).startswith(".")]
            # some object stores list the folder's own placeholder in it
            return [self._resolved(entry) for entry in visible if entry["name"].strip("/") != path.strip("/")]
        except OSError as error:
            raise InputError(f"{self._where}: cannot be listed ({error})") from error

    def _resolved(self, entry: dict[str, Any]) -> dict[str, Any]:
        """What a link points to: a listing says only that it is one."""
        return dict(self._fs.info(entry["name"])) if entry.get("islink") else entry

    def _checked(self, name: str) -> str:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{self._where}/{name!a}: a file name that is not UTF-8; rename it") from error
        return name


def open_archive(url: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """List an archive.

    Args:
        url: a folder of class folders.
        class_names: the classes to label by, for held-out images; some may be missing. By
            default the archive's own folders, sorted.

    Raises:
        InputError: there is no such folder, it has no class folders, a class folder is empty or
            is not among class_names.
    """
    return FolderArchive(url, class_names)


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]
