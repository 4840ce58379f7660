"""Class folders: which folders of an archive are the classes, whether the archive is a folder, a tar or a zip."""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from storage.archives.account import (
    IMAGE_OUTSIDE,
    OUTSIDE,
    Account,
    check_splits,
    is_archive_name,
    is_image_name,
    shown,
)
from storage.archives.listing import ListedFile

_NUMBERED = re.compile(r"\d{5,}", re.ASCII)
_PART = re.compile(r"(\d{5,})/(?:img)?(\d{5,})\.\w+", re.ASCII)
_EDM_LABELS = "dataset.json"


class Found(NamedTuple):
    """A file of an archive before it is known what it is."""

    path: str
    """Path in the archive, without ``.``, ``..`` and hidden parts."""
    size: int
    """Bytes."""
    location: Any
    """Location of its bytes, for the archive's fetch function."""


def class_folders(
    account: Account, files: Collection[Found], folders: Iterable[str] = (), known: tuple[str, ...] | None = None
) -> list[ListedFile]:
    """The images of class folders. Every file below a class folder counts as an image of that class.

    The classes are the folders at the top, or those in a single folder at the top that holds two or more
    folders and no images. A single folder is a class itself if its folders are numbered parts of one set: names
    of five or more digits, with no file name twice, as FFHQ is published.

    Args:
        account: counts the files outside the class folders.
        files: all visible files.
        folders: the visible folders that are listed themselves, so that empty ones are found.
        known: the classes to label by, if given; a single folder that is not among them is looked into.

    Raises:
        InputError: a class folder is empty or named as one inside another, folders are splits and not classes, a
            single folder could be a class or hold the classes, or there is an archive among the images.
    """
    tree = Tree(files, folders)
    tree.check(account.where)
    top = account.top = tree.top(account, known)
    _check_classes(account, tree, files)
    listed = list(_listed(account, files, top))
    empty = sorted(tree.below[top] - {file.class_name for file in listed})
    if empty:
        raise account.refused(f"{top}{empty[0]}", "class folder without files; fill it or remove it")
    note_odd(account, listed)
    return listed


def note_odd(account: Account, listed: Collection[ListedFile]) -> None:
    """Note the images whose place or name others might not take for that of an image of their class."""
    account.note("images in folders below their class", [file.name for file in listed if "/" in file.path])
    unnamed = [file.name for file in listed if not is_image_name(file.path)]
    account.note("files taken for images, without the ending of an image", unnamed)


def _check_classes(account: Account, tree: "Tree", files: Iterable[Found]) -> None:
    """Check that the folders are classes, as far as the names tell.

    Raises:
        InputError: they are parts of FFHQ, or of a set that EDM's tools have packed, or one holds a folder named
            after another.
    """
    top, classes = account.top, tree.below[account.top]
    labels = f"{top}{_EDM_LABELS}"
    if classes and all(map(_NUMBERED.fullmatch, classes)) and any(file.path == labels for file in files):
        raise account.refused(labels, "has the labels, so the folders are no classes; make class folders")
    if _are_parts(files, top):
        name = min(classes)
        problem = "one of the numbered parts of a set, not a class; for one class, put all parts into one folder"
        raise account.refused(f"{top}{name}", f"{problem}, and name the folder around it as the archive")
    for name in sorted(classes):
        twins = sorted(twin for twin in tree.below[f"{top}{name}/"] & classes - {name} if not twin.isdecimal())
        if twins:
            raise account.refused(
                f"{top}{name}/{twins[0]}", f"in a class, but named after the class {twins[0]!r}; move it"
            )


def _are_parts(files: Iterable[Found], top: str) -> bool:
    """Whether the images in folders below one are numbered on through them, 1,000 in each.

    The folders have the number of their first image, as FFHQ's, or their own, as those of EDM's tools.
    """
    inside = [path[len(top) :] for path, _, _ in files if path.startswith(top) and "/" in path[len(top) :]]
    numbers = [(int(match[1]), int(match[2]) // 1000) for match in map(_PART.fullmatch, inside) if match]
    return 0 < len(numbers) == len(inside) and all(folder in (part, 1000 * part) for folder, part in numbers)


def _listed(account: Account, files: Iterable[Found], top: str) -> Iterator[ListedFile]:
    for path, size, location in files:
        if is_archive_name(path):
            raise account.refused(
                path, "an archive among class folders; unpack it, or name it or its folder as the archive"
            )
        class_name, slash, inside = path.removeprefix(top).partition("/")
        if path.startswith(top) and slash:
            yield ListedFile(class_name, inside, size, location)
        else:
            account.pass_over(IMAGE_OUTSIDE if is_image_name(path) else OUTSIDE, path)


class Tree:
    """The folders of an archive; the path of each ends in a slash, that of the top is empty.

    Attributes:
        below: names of the folders directly in each folder.
    """

    def __init__(self, files: Collection[Found], folders: Iterable[str]) -> None:
        self._files = files
        self.below: dict[str, set[str]] = {"": set()}
        self._with_images = {self._add(path.rpartition("/")[0]) for path, _, _ in files if is_image_name(path)}
        for path in (*(path.rpartition("/")[0] for path, _, _ in files), *folders):
            self._add(path)

    def check(self, where: str) -> None:
        """Check that no folders that lie side by side are the splits of a data set.

        Raises:
            InputError: two are.
        """
        for folder, names in self.below.items():
            check_splits(f"{where}/{shown(folder)}".rstrip("/"), names)

    def _add(self, folder: str) -> str:
        """Add a folder with those that hold it; return its path with a slash."""
        path = f"{folder}/" if folder else ""
        if path not in self.below:
            outer, _, name = folder.rpartition("/")
            self.below[self._add(outer)].add(name)
            self.below[path] = set()
        return path

    def top(self, account: Account, known: tuple[str, ...] | None) -> str:
        """The folder that holds the class folders.

        Raises:
            InputError: there is one folder, and both its images and its folders could be the classes.
        """
        around = list(self._around())
        if known is not None and (fits := [top for top in around if not self.below[top].isdisjoint(known)]):
            return fits[0]
        top = around[-1]
        if len(around) < 2 or len(self.below[top]) < 2:
            return ""
        if self._is_numbered(top):
            text = f"one class, {around[1][:-1]!r}: the numbered folders in {top[:-1]!r} are taken as parts of it"
            advice = (
                "" if _are_parts(self._files, top) else f"; to have a class for each, name {top[:-1]!r} as the archive"
            )
            account.notes.append(text + advice)
            return ""
        if top in self._with_images:
            problem = (
                "holds images and folders, so it may be one class or hold the classes; move the images or the folders"
            )
            raise account.refused(top[:-1], problem)
        account.notes.append(f"the classes are the folders in {top[:-1]!r}")
        return top

    def may_hold_classes(self) -> bool:
        """Whether there are two or more folders, not numbered, and no images beside them."""
        top = list(self._around())[-1]
        return len(self.below[top]) > 1 and top not in self._with_images and not self._is_numbered(top)

    def _around(self) -> Iterator[str]:
        """The top, and the folders that lie around all others; only the last of them may hold images itself."""
        top = ""
        yield top
        while len(self.below[top]) == 1 and (not top or top not in self._with_images):
            top = f"{top}{next(iter(self.below[top]))}/"
            yield top

    def _is_numbered(self, top: str) -> bool:
        """Whether the folders in one are numbered parts of a set whose file names are all different."""
        names = [path.rpartition("/")[2] for path, _, _ in self._files if path.startswith(top)]
        return all(map(_NUMBERED.fullmatch, self.below[top])) and len(set(names)) == len(names)
