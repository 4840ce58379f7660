"""Webdataset samples: an image and its label have the same name in a tar, up to its first dot."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from storage.archives.account import FIELD, IMAGE_EXTENSIONS, NO_SAMPLE, Account, is_archive_name, is_image_name
from storage.archives.listing import ListedFile, class_names_of
from storage.archives.patterns import below
from storage.archives.tar_index import Entry, Tar
from storage.errors import InputError

_SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


def has_labels(tar: Tar) -> bool:
    """Whether a tar holds labels of samples."""
    return any(entry.name.endswith(".cls") for entry in tar.entries)


def samples(account: Account, tars: Iterable[Tar], class_names: tuple[str, ...] | None) -> Iterator[ListedFile]:
    """The images of webdataset samples with their labels.

    If names start anew in each tar, the tar's name stands before each.

    Args:
        account: counts the files that are neither image nor label, and what was passed over in the tars.
        tars: the tars.
        class_names: the classes to label by, if given.

    Raises:
        InputError: a sample has not one image and one label, or a name with another dot.
    """
    tars = list(tars)
    places = [name.removesuffix(".tar") for name in below([tar.where for tar in tars])]
    pairs = [(place, *pair) for place, tar in zip(places, tars, strict=True) for pair in _pairs(account, tar)]
    names = class_names_of({label for _, label, _ in pairs}, class_names)
    starts_anew = len({(label, image.name) for _, label, image in pairs}) < len(pairs)
    for place, label, image in pairs:
        path = f"{place}/{image.name}" if starts_anew else image.name
        yield ListedFile(names[label], path, image.span.size, image.span)


class _Sample(NamedTuple):
    """The files of a webdataset sample, which have the same name up to its first dot."""

    labels: list[str]
    images: list[Entry]
    others: list[str]


def _pairs(account: Account, tar: Tar) -> Iterator[tuple[str, Entry]]:
    """Label and image of each sample of a tar."""
    inside = "" if tar.where == account.where else f"{tar.name}.tar/"
    account.add(tar.account, inside)
    for key, (labels, images, others) in _sampled(tar).items():
        dotted = [name for name in others if name.endswith(".cls") or (is_image_name(name) and not images)]
        if dotted:
            problem = "a sample's name ends at its first dot; rename it without dots inside"
            raise tar.account.refused(dotted[0], problem)
        if (labels or images) and not (len(labels) == len(images) == 1 and labels[0]):
            counts = f"{len(images)} images and {len(labels)} labels"
            raise InputError(f"{tar.where}/{key}: {counts}; a sample is one image and one .cls file with a label")
        for name in others:
            account.pass_over(FIELD if images else NO_SAMPLE, inside + name)
        if images:
            yield labels[0], images[0]


def _sampled(tar: Tar) -> dict[str, _Sample]:
    """The samples of a tar by name."""
    samples: dict[str, _Sample] = {}
    for entry in tar.entries:
        if is_archive_name(entry.name):
            raise tar.account.refused(entry.name, "an archive among samples; keep it elsewhere")
        match = _SAMPLE.fullmatch(entry.name)
        sample = samples.setdefault(match[1] if match else entry.name, _Sample([], [], []))
        ending = match[2] if match else ""
        if ending == "cls":
            sample.labels.append(entry.text.decode("utf-8-sig", errors="replace").strip())
        elif ending.lower() in IMAGE_EXTENSIONS:
            sample.images.append(entry)
        else:
            sample.others.append(entry.name)
    return samples
