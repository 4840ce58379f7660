"""A folder of class folders."""

from collections.abc import Iterator
from typing import Any

import fsspec

from storage import uri
from storage.archives.listing import Archive, ListedFile
from storage.errors import InputError


def open_folder(url: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """A folder of class folders. Every file below a class folder counts as an image of that class.

    Names that begin with a dot are skipped. Links to files and to class folders are followed; links to
    folders further down are not, since they could form a cycle.

    Raises:
        InputError: there are no class folders, one is empty or cannot be listed, or as `Archive`.
    """
    fs, path = uri.filesystem(url)
    folder = _Folder(fs, uri.redact(url), path.rstrip("/"))
    return Archive(folder.where, folder.files(), lambda path: bytes(fs.cat_file(path)), class_names)


class _Folder:
    def __init__(self, fs: fsspec.AbstractFileSystem, where: str, root: str) -> None:
        self.where, self._fs, self._root = where, fs, root

    def files(self) -> Iterator[ListedFile]:
        folders = [entry for entry in entries(self._fs, self.where, self._root) if entry["type"] == "directory"]
        if not folders:
            raise InputError(f"{self.where}: no class folders; put the images of each class in a folder of its own")
        for folder in folders:
            files = list(self._below(folder["name"]))
            class_name = entry_name(folder)
            if not files:
                raise InputError(f"{self.where}/{class_name}: class folder without files; fill it or remove it")
            for path, entry in files:
                yield ListedFile(class_name, path, int(entry["size"]), f"{folder['name'].rstrip('/')}/{path}")

    def _below(self, folder: str, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """The files below a folder, at any depth, each with its path relative to that folder."""
        for entry in entries(self._fs, self.where, folder):
            if entry["type"] == "file":
                yield prefix + entry_name(entry), entry
            elif entry["type"] == "directory" and not entry.get("islink"):
                yield from self._below(entry["name"], f"{prefix}{entry_name(entry)}/")


def entries(fs: fsspec.AbstractFileSystem, where: str, path: str) -> list[dict[str, Any]]:
    """The visible entries of a folder, as fsspec describes them, with links followed.

    Raises:
        InputError: the folder cannot be listed, or a link is broken.
    """
    try:
        listed = fs.ls(path, detail=True)
        visible = [entry for entry in listed if not entry_name(entry).startswith(".")]
        # some object stores list a placeholder object of the folder itself
        inside = [entry for entry in visible if entry["name"].strip("/") != path.strip("/")]
        # for a link, a listing does not give the type and size of its target
        return [dict(fs.info(entry["name"])) if entry.get("islink") else entry for entry in inside]
    except OSError as error:
        raise InputError(f"{where}: cannot be listed ({error})") from error


def entry_name(entry: dict[str, Any]) -> str:
    """The last part of an entry's path."""
    return str(entry["name"]).rstrip("/").rpartition("/")[2]
