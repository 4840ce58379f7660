"""Tars of class tars, of webdataset samples or of class folders.

To read an image is one range of the outermost file. Labels are read as text; nothing is unpickled.
"""

from collections.abc import Iterable, Sequence

from storage import uri
from storage.archives.account import Account, check_one_split, check_splits, is_archive_name, is_image_name, shown
from storage.archives.classes import Found, Tree, class_folders, note_odd
from storage.archives.listing import Archive, ListedFile
from storage.archives.samples import has_labels, samples
from storage.archives.tar_index import Tar, indexed, list_tars, span_reader
from storage.errors import InputError

_TEXTS = ("txt", "json", "caption")


def open_tar(url: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """One tar of class tars, of webdataset samples or of class folders. The type is detected from its contents.

    Raises:
        InputError: the tar is damaged or of none of these types, or as `Archive`.
    """
    fs, _ = uri.filesystem(url)
    where = uri.redact(url)
    (outer,), stamp = list_tars(fs, [url])
    account = Account(where)
    inner = [entry for entry in outer.entries if entry.name.endswith(".tar")]
    files: Iterable[ListedFile]
    if inner and not has_labels(outer):
        account.add(outer.account)
        _check_beside(account, outer, inner[0].name)
        spans = tuple((f"{where}/{shown(entry.name)}", entry.span) for entry in inner)
        files = _class_tars(account, indexed(fs, spans, stamp))
    elif has_labels(outer):
        files = samples(account, [outer], class_names)
    else:
        files = _class_folders(account, outer, class_names)
    return Archive(account, files, span_reader(fs), class_names)


def open_tars(urls: list[str], account: Account, class_names: tuple[str, ...] | None = None) -> Archive:
    """Several tars as one archive: of webdataset samples if they hold labels, one for each class otherwise.

    Raises:
        InputError: as `open_tar`.
    """
    fs, _ = uri.filesystem(urls[0])
    tars, _ = list_tars(fs, urls)
    files: Iterable[ListedFile]
    if any(map(has_labels, tars)):
        check_one_split(account.where, [f"{tar.name}.tar" for tar in tars])
        files = samples(account, tars, class_names)
    else:
        files = _class_tars(account, tars)
    return Archive(account, files, span_reader(fs), class_names)


def _check_beside(account: Account, tar: Tar, class_tar: str) -> None:
    """Check that the class tars in a tar lie in one folder, and that nothing else there could be an image of a class.

    Raises:
        InputError: there is another folder with tars, or one with images, or the folder itself holds images.
    """
    folder = class_tar.rpartition("/")[0]
    for entry in tar.entries:
        outer = entry.name.rpartition("/")[0]
        if entry.name.endswith(".tar"):
            if outer != folder:
                raise account.refused(entry.name, f"lies in another folder than {class_tar!r}; keep class tars in one")
        elif outer and outer == folder and is_image_name(entry.name):
            raise account.refused(
                class_tar, f"a tar beside {entry.name!r}, so {folder!r} may be a class; pack one kind"
            )
        elif outer and is_image_name(entry.name):
            raise account.refused(class_tar, f"a class tar beside class folders with {entry.name!r}; pack one kind")
        else:
            account.pass_over_beside([entry.name])


def _class_tars(account: Account, tars: Sequence[Tar]) -> list[ListedFile]:
    """The images of tars that are named after their classes."""
    check_splits(account.where, [tar.name for tar in tars])
    for tar in tars:
        account.add(tar.account, f"{tar.name}.tar/")
        _check_class_tar(tar)
    listed = [ListedFile(tar.name, entry.name, entry.span.size, entry.span) for tar in tars for entry in tar.entries]
    note_odd(account, listed)
    return listed


def _check_class_tar(tar: Tar) -> None:
    """Check that a tar holds images of one class, as far as the names tell.

    Raises:
        InputError: it is empty, holds archives or folders that may be classes, or has images with texts of the same
            names, which are samples.
    """
    if not tar.entries:
        raise InputError(f"{tar.where}: class tar without files; fill it or remove it")
    tree = Tree(_found(tar), tar.folders)
    tree.check(tar.where)
    if tree.may_hold_classes():
        problem = "holds folders, which may be classes; name this tar alone as the archive, or pack its class without"
        raise InputError(f"{tar.where}: {problem}")
    stems = {entry.name.rpartition(".")[0] for entry in tar.entries if is_image_name(entry.name)}
    for entry in tar.entries:
        if is_archive_name(entry.name):
            raise tar.account.refused(entry.name, "an archive inside a class tar; unpack it")
        stem, _, ending = entry.name.rpartition(".")
        if ending in _TEXTS and stem in stems:
            raise tar.account.refused(entry.name, "a sample with no .cls file, so without a class; add the labels")


def _found(tar: Tar) -> list[Found]:
    return [Found(entry.name, entry.span.size, entry.span) for entry in tar.entries]


def _class_folders(account: Account, tar: Tar, class_names: tuple[str, ...] | None) -> list[ListedFile]:
    account.add(tar.account)
    files = class_folders(account, _found(tar), tar.folders, class_names)
    if not files:
        types = "class tars, class folders or .cls files"
        raise InputError(f"{tar.where}: no {types} found; for held-out images alone, set archive.held_out_labels")
    return files
