"""Locations of several files: ``{000..123}`` and ``{a,b}`` as in a shell, and the wildcards ``*`` and ``[...]``.

A wildcard needs a store that can be listed; braces need none.
"""

import re
from collections.abc import Iterator
from itertools import islice, pairwise
from os.path import commonprefix

import fsspec

from storage import uri
from storage.archives.account import check_splits
from storage.archives.listing import first_line
from storage.errors import InputError

MAX_FILES = 1_000_000

_BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}|\{([^{}]*,[^{}]*)\}", re.ASCII)
_WILDCARD = re.compile(r"[*[]")


def expand(url: str) -> list[str] | None:
    """The URLs of the files that a pattern stands for; None if the URL is no pattern.

    Files that match a wildcard are sorted, without hidden ones. If something lies at the URL as it is written, it is
    no pattern.

    Raises:
        InputError: a range is descending, no file matches, there are too many files, one stands twice, or folders
            that match are the splits of a data set.
        StorageError: the store does not answer.

    Examples:
        >>> expand("memory://lab/train-{009..010}.tar")
        ['memory://lab/train-009.tar', 'memory://lab/train-010.tar']
    """
    is_pattern = _BRACES.search(url) or _WILDCARD.search(uri.redact(url))
    if not is_pattern or uri.chain(url)[0] or uri.exists(url):
        return None
    urls = list(islice(_files(url), MAX_FILES + 1))
    if len(urls) > MAX_FILES:
        raise InputError(f"{uri.redact(url)}: more than {MAX_FILES:,} files; name fewer")
    twice = next((one for one, other in pairwise(sorted(urls)) if one == other), None)
    if twice is not None:
        raise InputError(f"{uri.redact(url)}: names {uri.redact(twice)} twice; name each file once")
    if _WILDCARD.search(uri.parent(url)):
        check_splits(uri.redact(url), {folder for name in below(urls) for folder in name.split("/")[:-1]})
    return urls


def below(urls: list[str]) -> list[str]:
    """The paths of files below the folder that holds them all."""
    parts = [url.split("/") for url in urls]
    shared = len(commonprefix([part[:-1] for part in parts]))  # noqa: RUF071  of lists
    return ["/".join(part[shared:]) for part in parts]


def _files(url: str) -> Iterator[str]:
    for name in _without_braces(url):
        yield from _matches(name) if _WILDCARD.search(uri.redact(name)) else [name]


def _without_braces(url: str) -> Iterator[str]:
    match = _BRACES.search(url)
    if match is None:
        yield url
        return
    for choice in _choices(match, uri.redact(url)):
        yield from _without_braces(url[: match.start()] + choice + url[match.end() :])


def _choices(match: re.Match[str], where: str) -> Iterator[str]:
    first, last, words = match.groups()
    if words is not None:
        yield from words.split(",")
    elif int(last) < int(first):
        raise InputError(f"{where}: {match[0]} is a descending range; write the smaller number first")
    else:
        yield from (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))


def _matches(url: str) -> list[str]:
    """The URLs that match wildcards, of which ``*`` matches no slash. A folder that is there as written is none."""
    fs, path = uri.filesystem(url)
    parts = url.rstrip("/").split("/")
    wild = [number for number, part in enumerate(parts) if _WILDCARD.search(part)]
    fixed = next((number for number in wild if not uri.exists("/".join(parts[: number + 1]))), None)
    if fixed is None:
        return [url]
    names = ["/".join(parts[:fixed] + found) for found in _found(fs, path.rstrip("/").split("/"), len(parts) - fixed)]
    visible = sorted(name for name in names if not uri.name(name).startswith("."))
    if not visible:
        raise InputError(f"{uri.redact(url)}: no such file, and none that matches; correct it, or name a folder")
    return visible


def _found(fs: fsspec.AbstractFileSystem, parts: list[str], wild: int) -> list[list[str]]:
    """The last parts of the paths that match, as many as may have wildcards."""
    literal = [_WILDCARD.sub(lambda mark: f"[{mark[0]}]", part) for part in parts[:-wild]]
    pattern = "/".join(literal + parts[-wild:]).replace("**", "*")
    try:
        return [str(path).rstrip("/").split("/")[-wild:] for path in fs.glob(pattern)]
    except (OSError, ValueError) as error:
        raise InputError(f"{pattern}: cannot be listed ({first_line(error)})") from error
