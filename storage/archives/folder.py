"""A folder whose folders are classes."""

from collections.abc import Iterator
from typing import Any

import fsspec

from storage import uri
from storage.archives.listing import Archive, Found
from storage.errors import InputError


def open_folder(url: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """A folder of class folders; every file inside one counts as an image of that class.

    Names that begin with a dot are passed over. Links are followed to files and class folders, but
    not to folders further down, where they could run in circles.

    Raises:
        InputError: it has no class folders, one is empty or cannot be listed, or as `Archive`.
    """
    fs, path = uri.filesystem(url)
    folder = _Folder(fs, uri.redact(url), path.rstrip("/"))
    return Archive(folder.where, folder.found(), lambda place: bytes(fs.cat_file(place)), class_names)


class _Folder:
    def __init__(self, fs: fsspec.AbstractFileSystem, where: str, root: str) -> None:
        self.where, self._fs, self._root = where, fs, root

    def found(self) -> Iterator[Found]:
        folders = [entry for entry in entries(self._fs, self.where, self._root) if entry["type"] == "directory"]
        if not folders:
            raise InputError(f"{self.where}: no class folders in it; put each class's images in a folder of its own")
        for folder in folders:
            files = list(self._files(folder["name"]))
            if not files:
                where = f"{self.where}/{entry_name(folder)}"
                raise InputError(f"{where}: class folder without files; fill it or remove it")
            for below, entry in files:
                yield Found(entry_name(folder), below, int(entry["size"]), f"{folder['name'].rstrip('/')}/{below}")

    def _files(self, path: str, below: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        for entry in entries(self._fs, self.where, path):
            if entry["type"] == "file":
                yield below + entry_name(entry), entry
            elif entry["type"] == "directory" and not entry.get("islink"):
                yield from self._files(entry["name"], f"{below}{entry_name(entry)}/")


def entries(fs: fsspec.AbstractFileSystem, where: str, path: str) -> list[dict[str, Any]]:
    """What lies in a folder and is not hidden, with links followed.

    Raises:
        InputError: it cannot be listed, or a link leads nowhere.
    """
    try:
        listed = fs.ls(path, detail=True)
        visible = [entry for entry in listed if not entry_name(entry).startswith(".")]
        # some object stores list the folder's own placeholder in it
        inside = [entry for entry in visible if entry["name"].strip("/") != path.strip("/")]
        # a listing says only that a link is one
        return [dict(fs.info(entry["name"])) if entry.get("islink") else entry for entry in inside]
    except OSError as error:
        raise InputError(f"{where}: cannot be listed ({error})") from error


def entry_name(entry: dict[str, Any]) -> str:
    """The last part of what a listing calls an entry."""
    return str(entry["name"]).rstrip("/").rpartition("/")[2]
