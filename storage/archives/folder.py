"""A folder of class folders, class folders by their names, and the walk through any folder of images."""

import os
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage import uri
from storage.archives.account import SPECIAL, Account, is_archive_name, is_document_name, is_image_name
from storage.archives.classes import Found, Tree, class_folders
from storage.archives.listing import Archive
from storage.errors import InputError
from storage.magic import HEAD, begins_as_image

_Entry = dict[str, Any]


def open_folder(url: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """A folder of class folders, by the rules of `class_folders`.

    Raises:
        InputError: there are no class folders, or as `walk`, `class_folders` or `Archive`.
    """
    account = Account(uri.redact(url))
    files, folders = _below(url, account)
    if not folders:
        raise InputError(f"{account.where}: no class folders; put the images of each class in a folder of its own")
    return _of_class_folders(url, account, files, folders, class_names)


def open_folders(urls: list[str], account: Account, class_names: tuple[str, ...] | None = None) -> Archive:
    """Several class folders of one store as one archive: that of a folder with these classes alone.

    Args:
        urls: the folders, each named after its class.
        account: of the archive, for what is passed over in it.
        class_names: the classes to label by; by default those of the folders.

    Raises:
        InputError: two have the same name, or as `open_folder`.
    """
    files, folders = list[Found](), list[str]()
    for url in urls:
        name, part = uri.name(url), Account(uri.redact(url))
        if name in folders:
            raise InputError(f"{account.where}: names two folders {name}; give each class one folder")
        inside, below = _below(url, part)
        account.add(part, f"{name}/")
        files += [file._replace(path=f"{name}/{file.path}") for file in inside]
        folders += [name, *(f"{name}/{folder}" for folder in below)]
    return _of_class_folders(urls[0], account, files, folders, class_names)


def _below(url: str, account: Account) -> tuple[list[Found], list[str]]:
    """The visible files and folders below a folder."""
    fs, path = uri.filesystem(url)
    files, folders = list[Found](), list[str]()
    for inside, entry in walk(fs, account, path):
        if entry["type"] == "directory":
            folders.append(inside)
        else:
            files.append(Found(inside, int(entry["size"]), entry["name"]))
    return files, folders


def _of_class_folders(
    url: str, account: Account, files: list[Found], folders: list[str], class_names: tuple[str, ...] | None
) -> Archive:
    fs, _ = uri.filesystem(url)
    images = class_folders(account, files, folders, class_names)
    return Archive(account, images, lambda path: bytes(fs.cat_file(path)), class_names)


def open_images(url: str) -> list[Found]:
    """The images of a folder and of all folders below it, whatever their classes, sorted by path.

    Images are known by their names, and where these do not tell, by their first bytes.

    Raises:
        InputError: there is an archive among the images, folders are splits, or as `walk`.
    """
    fs, root = uri.filesystem(url)
    account = Account(uri.redact(url))
    images, folders = list[Found](), list[str]()
    for path, entry in walk(fs, account, root):
        if entry["type"] == "directory":
            folders.append(path)
        elif is_archive_name(path):
            raise account.refused(path, "an archive among images; unpack it, or move it away")
        elif is_image_name(path) or _begins_as_image(fs, path, entry["name"]):
            images.append(Found(path, int(entry["size"]), entry["name"]))
    Tree(images, folders).check(account.where)
    return sorted(images)


def _begins_as_image(fs: fsspec.AbstractFileSystem, path: str, place: str) -> bool:
    return not is_document_name(path) and begins_as_image(bytes(fs.cat_file(place, end=HEAD)))


def walk(fs: fsspec.AbstractFileSystem, account: Account, root: str) -> Iterator[tuple[str, _Entry]]:
    """The visible files and folders below a folder, at any depth, each with its path below it. Links are followed.

    Raises:
        InputError: a folder cannot be listed, or a link is broken or leads to a folder that holds it.
    """
    root = root.rstrip("/")
    yield from _walk(fs, account, root, "", (_real(fs, root),))


def _walk(
    fs: fsspec.AbstractFileSystem, account: Account, folder: str, inside: str, around: tuple[str, ...]
) -> Iterator[tuple[str, _Entry]]:
    """As `walk`; ``around`` has the real paths of the folder and of all that hold it."""
    for entry in entries(fs, account, folder, inside):
        path = inside + entry_name(entry)
        yield path, entry
        if entry["type"] == "directory":
            real = _real(fs, entry["name"]) if entry.get("islink") else f"{around[-1]}/{entry_name(entry)}"
            if real in around:
                raise account.refused(path, "a circle: links lead to a folder that holds them; remove the link")
            yield from _walk(fs, account, entry["name"], f"{path}/", (*around, real))


def _real(fs: fsspec.AbstractFileSystem, path: str) -> str:
    return os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path


def entries(fs: fsspec.AbstractFileSystem, account: Account, folder: str, inside: str = "") -> list[_Entry]:
    """The visible files and folders directly in a folder, as fsspec describes them, with links followed.

    Args:
        fs: the file system.
        account: counts what is passed over.
        folder: path of the folder.
        inside: path of the folder in the archive, empty or with a slash at its end.

    Raises:
        InputError: the folder cannot be listed, or a link is broken.
    """
    try:
        # some object stores list a placeholder object of the folder itself
        listed = [entry for entry in fs.ls(folder, detail=True) if entry["name"].strip("/") != folder.strip("/")]
        visible = [entry for entry in listed if account.sees(inside + entry_name(entry))]
        # for a link, a listing does not give the type and size of its target
        followed = [dict(fs.info(entry["name"])) if entry.get("islink") else entry for entry in visible]
    except OSError as error:
        raise InputError(f"{account.where}: cannot be listed ({error})") from error
    for entry in followed:
        if entry["type"] == "link":
            raise account.refused(inside + entry_name(entry), "a link, which this store does not follow; replace it")
        if entry["type"] not in ("file", "directory"):
            account.pass_over(SPECIAL, inside + entry_name(entry))
    return [entry for entry in followed if entry["type"] in ("file", "directory")]


def entry_name(entry: _Entry) -> str:
    """The last part of an entry's path."""
    return str(entry["name"]).rstrip("/").rpartition("/")[2]
