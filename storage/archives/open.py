"""Where images come from: folders, tars, zips and Parquet, on any file system, behind one interface."""

from typing import Annotated, Self

from pydantic import AfterValidator, model_validator

from storage import uri
from storage.archives.folder import entries, entry_name, open_folder
from storage.archives.held_out import open_flat
from storage.archives.listing import Archive, Member
from storage.archives.parquets import open_parquet
from storage.archives.tars import expanded, open_tar, open_tars
from storage.archives.zips import open_zip
from storage.config import Config, operational
from storage.errors import InputError

__all__ = ["Archive", "ArchiveRef", "Member", "open_archive"]

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class ArchiveRef(Config):
    """The images to learn from, and those to measure with. What lies there enters a digest by its listing."""

    train: Annotated[str, AfterValidator(uri.without_credentials)] = operational()
    """URL of images with classes: a folder of class folders, tars, a zip or Parquet files."""
    held_out: Annotated[str, AfterValidator(uri.without_credentials)] | None = operational(None)
    """URL of images of the same classes that training never sees; none without."""
    held_out_labels: Annotated[str, AfterValidator(uri.without_credentials)] | None = operational(None)
    """URL of the classes when ``held_out`` is a tar of images alone: a text with one class name a line, in the order
    of the sorted file names, or ImageNet's ``ILSVRC2012_devkit_t12.tar.gz`` as it is published."""

    @model_validator(mode="after")
    def _labels_of_something(self) -> Self:
        if self.held_out_labels is not None and self.held_out is None:
            raise ValueError("held_out_labels needs held_out")
        return self

    def absolute(self) -> Self:
        """The same for a process that works in another folder."""
        chains = {name: url.rpartition("::") for name, url in self if url is not None}
        return self.model_copy(update={name: f"{a}{b}{uri.absolute(url)}" for name, (a, b, url) in chains.items()})


def open_archive(url: str, class_names: tuple[str, ...] | None = None, labels: str | None = None) -> Archive:
    """List an archive, whose kind is told by its name and by what is in it.

    Args:
        url: a folder of class folders, of tars or of Parquet files; a tar, or several as
            ``name-{000..123}.tar``; a zip; a Parquet file.
        class_names: the classes to label by, for held-out images; some may be missing. By
            default the archive's own, sorted.
        labels: URL of the class names of a tar of images alone, one a line, or of ImageNet's devkit.

    Raises:
        InputError: there is nothing of these kinds, it is damaged, or as `Archive`.
        StorageError: the labels cannot be read.
    """
    where = uri.redact(url)
    name = where.lower()
    if name.endswith(_COMPRESSED):
        raise InputError(f"{where}: compressed, so no image in it can be read by itself; decompress it to a .tar")
    if labels is not None:
        if not name.endswith(".tar"):
            raise InputError(f"{where}: class names beside it are for a tar of images alone")
        return open_flat(url, labels, class_names)
    if name.endswith(".tar"):
        urls = expanded(url)
        return open_tar(url, class_names) if urls == [url] else open_tars(urls, where, class_names)
    if name.endswith(".zip"):
        return open_zip(url, class_names)
    if name.endswith(".parquet"):
        return open_parquet([url], where, class_names)
    return _open_below(url, class_names)


def _open_below(url: str, class_names: tuple[str, ...] | None) -> Archive:
    """A folder: of class folders if there are folders in it, else of Parquet files or of tars."""
    fs, path = uri.filesystem(url)
    where = uri.redact(url)
    if not fs.exists(path):
        raise InputError(f"{where}: no such folder of images")
    if not fs.isdir(path):
        raise InputError(f"{where}: not a folder, and its name ends as no file of images does (.tar, .zip, .parquet)")
    inside = entries(fs, where, path)
    files = sorted(entry_name(entry) for entry in inside if entry["type"] == "file")
    for ending, opened in ((".parquet", open_parquet), (".tar", open_tars)):
        urls = [uri.join(url, name) for name in files if name.endswith(ending)]
        if urls and all(entry["type"] == "file" for entry in inside):
            return opened(urls, where, class_names)
    return open_folder(url, class_names)
