"""Opens an archive of any type: folders, tars, zips and Parquet, on any fsspec file system."""

import time
from typing import Self

from pydantic import model_validator

from storage import uri
from storage.archives.account import Account
from storage.archives.folder import entries, entry_name, open_folder, open_folders
from storage.archives.held_out import open_labelled_tar
from storage.archives.listing import Archive, Member
from storage.archives.once import listed
from storage.archives.patterns import expand
from storage.archives.tars import open_tar, open_tars
from storage.archives.zips import open_zip
from storage.config import Config, Location, operational
from storage.errors import InputError

HELD_OUT = "held_out"
"""The split of images that no model is trained on."""
__all__ = ["Archive", "ArchiveRef", "Member", "open_archive", "open_splits"]

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class ArchiveRef(Config):
    """The images to train on, and held-out images to evaluate with.

    Locations are not part of the identity; contents enter the digest by their listing.
    """

    train: Location = operational()
    """URL of the training images with their classes: a folder of class folders, tars, a zip or Parquet files. Several
    tars or Parquet files may be named by a pattern: ``train-{000..146}.tar``, ``data/train-*.parquet``; so may some
    of the class folders: ``digits/{0..7}``."""
    held_out: Location | None = operational(None)
    """URL of held-out images of the same classes, which are not trained on; null for none."""
    held_out_labels: Location | None = operational(None)
    """URL of the labels, if ``held_out`` is a tar of images without class folders: a text file with one class name a
    line, in the order of the sorted file names, or ImageNet's ``ILSVRC2012_devkit_t12.tar.gz`` as published."""

    @model_validator(mode="after")
    def _labels_need_images(self) -> Self:
        if self.held_out_labels is not None and self.held_out is None:
            raise ValueError("held_out_labels needs held_out")
        return self

    def absolute(self) -> Self:
        """The same archives with absolute paths, for processes with another working directory."""
        return self.model_copy(update={name: _absolute(url) for name, url in self if url is not None})


def _absolute(url: str) -> str:
    """The URL, with an absolute path if it is one, or if its last part in a chain is one."""
    before, last = uri.chain(url)
    return f"{before}::{uri.absolute(last)}" if before else uri.absolute(last)


def open_splits(ref: ArchiveRef) -> dict[str, Archive]:
    """The archives by split: ``train`` and, if there are held-out images, ``held_out``.

    Raises:
        InputError, StorageError: as `open_archive`.
    """
    return listed(ref.absolute(), _open_splits)


def _open_splits(ref: ArchiveRef) -> dict[str, Archive]:
    train = open_archive(ref.train)
    if ref.held_out is None:
        return {"train": train}
    return {"train": train, HELD_OUT: open_archive(ref.held_out, train.class_names, ref.held_out_labels)}


def open_archive(url: str, class_names: tuple[str, ...] | None = None, labels: str | None = None) -> Archive:
    """Open an archive and list its files. Its type is detected from its name and its contents.

    Args:
        url: a folder of class folders, of tars or of Parquet files; a tar, a zip or a Parquet file; several tars,
            Parquet files or class folders by a pattern such as ``name-{000..123}.tar``, ``data/train-*.parquet`` or
            ``digits/{0..7}``, see `expand`.
        class_names: the classes to label by, for held-out images; some may have no images. By
            default the archive's own classes, sorted.
        labels: for a tar of images without class folders: URL of a text file with one class name a
            line, or of ImageNet's devkit.

    Raises:
        InputError: there is no archive of these types, it is damaged, or as `Archive`.
        StorageError: the labels cannot be read.

    Examples:
        >>> import numpy as np
        >>> from storage.images.grid import image_grid
        >>> picture = image_grid(np.zeros((1, 8, 8, 3), np.uint8), columns=1)
        >>> for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        ...     uri.write(f"memory://pets/{name}", picture)
        >>> archive = open_archive("memory://pets")
        >>> archive.class_names, [member.label for member in archive.members]
        (('cat', 'dog'), [0, 0, 1])
    """
    begin = time.perf_counter()
    archive = _opened(url, class_names, labels)
    archive.seconds = time.perf_counter() - begin
    return archive


def _opened(url: str, class_names: tuple[str, ...] | None, labels: str | None) -> Archive:
    where = uri.redact(url)
    name = where.lower()
    if name.endswith(_COMPRESSED):
        raise InputError(f"{where}: a compressed tar cannot be read by ranges; decompress it to a .tar")
    if labels is not None:
        if not name.endswith(".tar"):
            raise InputError(f"{where}: held_out_labels needs a .tar of images without class folders")
        return open_labelled_tar(url, labels, class_names)
    urls = expand(url)
    if urls is not None:
        return _open_several(urls, where, class_names)
    if not uri.chain(url)[0] and uri.is_folder(url):
        return _open_folder(url, class_names)
    if name.endswith(".tar"):
        return open_tar(url, class_names)
    if name.endswith(".zip"):
        return open_zip(url, class_names)
    if name.endswith(".parquet"):
        return _open_parquet([url], Account(where), class_names)
    return _open_folder(url, class_names)


def _open_several(urls: list[str], where: str, class_names: tuple[str, ...] | None) -> Archive:
    """The files or class folders of a pattern as one archive."""
    if all(uri.redact(url).lower().endswith(".tar") for url in urls):
        return open_tars(urls, Account(where), class_names)
    if all(uri.redact(url).lower().endswith(".parquet") for url in urls):
        return _open_parquet(urls, Account(where), class_names)
    other = next((url for url in urls if not uri.is_folder(url)), None)
    if other is None:
        return open_folders(urls, Account(where), class_names)
    if not uri.exists(other):
        raise InputError(f"{uri.redact(other)}: no such folder of images, which {where} names")
    first, last = uri.redact(urls[0]), uri.redact(urls[-1])
    found = f"stands for {first}" if len(urls) == 1 else f"stands for {len(urls):,} files from {first} to {last}"
    raise InputError(f"{where}: {found}; a pattern is for .tar files, .parquet files or class folders alone")


def _open_folder(url: str, class_names: tuple[str, ...] | None) -> Archive:
    """A folder of Parquet files or tars if it holds some and no folders; a folder of class folders otherwise."""
    fs, path = uri.filesystem(url)
    account = Account(uri.redact(url))
    if not fs.exists(path):
        raise InputError(f"{account.where}: no such folder of images")
    if not fs.isdir(path):
        raise InputError(f"{account.where}: neither a folder nor a .tar, .zip or .parquet file")
    contents = entries(fs, account, path)
    if any(entry["type"] == "directory" for entry in contents):
        return open_folder(url, class_names)
    names = sorted(entry_name(entry) for entry in contents)
    for extension, open_files in ((".parquet", _open_parquet), (".tar", open_tars)):
        chosen = [name for name in names if name.endswith(extension)]
        if chosen:
            account.pass_over_beside(sorted({*names} - {*chosen}))
            return open_files([uri.join(url, name) for name in chosen], account, class_names)
    account.pass_over_beside(names)
    return open_folder(url, class_names)


def _open_parquet(urls: list[str], account: Account, class_names: tuple[str, ...] | None = None) -> Archive:
    from storage.archives.parquets import open_parquet  # imports pyarrow, which many commands do without

    return open_parquet(urls, account, class_names)
