"""Garbage in a root: outputs that nothing reaches, in the order in which they can be deleted.

An output is deleted after all that was made from it. Its manifest becomes `BEGUN` before all else, and goes last. So
after a kill at any point every output with a manifest is whole, and so is all that it was made from. What a kill leaves
of an output is unfinished, it is known what that was made from, and the next call deletes it.
"""

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from storage import uri
from storage.errors import StorageError
from storage.manifest import BEGUN, MANIFEST
from storage.parallel import threads
from storage.root import READERS, Output, State, Usage, above, usage, usages, users

_TEMPORARY = re.compile(r"(.*/)?\.[^/]+\.[0-9a-f]{32}\.tmp")  # as `storage.local_file` names them


@dataclass(frozen=True)
class Garbage:
    """What may be deleted."""

    outputs: Mapping[Output, Usage]
    """In the order of deletion."""
    temporary: Mapping[str, int]
    """URLs of files that killed writers left in outputs that stay, with their sizes in bytes."""
    kept: Mapping[str, str]
    """Why each other output stays, by its key; empty if something that stays was made from it."""


def garbage(
    found: Sequence[Output],
    reasons: Mapping[str, str],
    *,
    pages: Collection[str],
    first: Collection[str],
    seconds: float,
    working: Collection[str],
) -> Garbage:
    """What nothing reaches.

    Args:
        found: all outputs of a root.
        reasons: why outputs are to stay, by their keys.
        pages: stages that nothing is made from. Their outputs stay as long as all that they show.
        first: stages whose outputs are made from no others.
        seconds: outputs to which something was written within so many seconds stay too.
        working: keys of outputs that someone may be writing, whose temporary files are no garbage.

    Raises:
        StorageError: an output stays, and nobody knows what it was made from; or the store does not answer.
    """
    known = {each.key: each for each in found}
    kept = dict(reasons)
    loose = _loose(known, kept, pages)
    used = dict(zip(loose, usages([known[key].url for key in loose]), strict=True))
    since = time.time() - seconds
    kept |= {key: "young" for key in loose if used[key].newest > since}
    kept |= {key: "behind a symbolic link" for key in loose if key not in kept and _is_linked(known[key])}
    loose = _loose(known, kept, pages)
    stay = [each for key, each in known.items() if key not in set(loose)]
    for each in stay:
        if each.facts is None and each.stage not in first:
            raise _unknown(each, kept.get(each.key, "something was made from it"))
    ordered = _children_first([known[key] for key in loose])
    return Garbage(
        {each: used[each.key] for each in ordered},
        _temporary([each for each in stay if each.key not in working], since),
        {each.key: kept.get(each.key, "") for each in stay},
    )


def delete(root: str, found: Garbage, tell: Callable[[Output], None]) -> list[str]:
    """Delete garbage; return what was written meanwhile, and so was left, as URLs.

    Args:
        root: folder of all outputs.
        found: what `garbage` has found in it.
        tell: called after each output that is gone.

    Raises:
        StorageError: the store refuses.
    """
    changed = [each.key for each in found.outputs if each.state is not State.FINISHED and _has_changed(each, found)]
    stay = above({each.key: each for each in found.outputs}, changed)
    doomed = [each for each in found.outputs if each.key not in stay]
    with threads(READERS) as pool:
        for level in _levels(doomed):
            list(pool.map(lambda each: _unmake(each, root), level))
        for level in _levels(doomed):  # what was made from an output is gone before it is forgotten what that was
            for each, _ in zip(level, pool.map(lambda each: _remove(each, root), level), strict=True):
                tell(each)
        list(pool.map(lambda url: uri.remove_tree(url, root), found.temporary))
    return [each.url for each in found.outputs if each.key in stay]


def _unmake(output: Output, root: str) -> None:
    """Make a finished output one that has only begun: after a kill it is known what it was made from."""
    manifest = uri.join(output.url, MANIFEST)
    uri.check_no_link(manifest, root)
    if uri.exists(manifest):
        uri.move(manifest, uri.join(output.url, BEGUN))


def _remove(output: Output, root: str) -> None:
    for name in uri.names(output.url):
        if name != BEGUN:  # last
            uri.remove_tree(uri.join(output.url, name), root)
    uri.remove_tree(output.url, root)


def _has_changed(output: Output, found: Garbage) -> bool:
    """Whether someone has written to an unfinished output since it was looked at, whatever his clock says."""
    now, before = usage(output.url), found.outputs[output]
    return (now.size, now.newest, set(now.files)) != (before.size, before.newest, set(before.files))


def _loose(known: Mapping[str, Output], kept: Mapping[str, str], pages: Collection[str]) -> list[str]:
    """The keys that nothing reaches."""
    reached = above(known, iter(kept))
    shown = {key for key, each in known.items() if _shows_only(each, known.keys() & reached, pages)}
    return [key for key in known if key not in reached | shown]


def _shows_only(output: Output, reached: Collection[str], pages: Collection[str]) -> bool:
    """Whether an output is a page, and all that it shows stays."""
    page = output.stage in pages and output.state is State.FINISHED
    return page and all(key in reached for key in output.parents.values())


def _is_linked(output: Output) -> bool:
    try:
        uri.check_no_link(uri.join(output.url, MANIFEST), output.root)
    except StorageError:
        return True
    return False


def _unknown(output: Output, why: str) -> StorageError:
    """The error for an output that stays, while nobody knows what it was made from."""
    what = f"its manifest {output.fault}" if output.fault else f"it is {output.state}"
    remedy = "run its stage again or delete the folder, then run gc again"
    where = uri.redact(output.url)
    return StorageError(f"{where}: stays ({why}), but {what}, so nobody knows what it was made from; {remedy}")


def _children_first(found: Sequence[Output]) -> list[Output]:
    return [each for level in _levels(found) for each in level]


def _levels(found: Sequence[Output]) -> list[list[Output]]:
    """The outputs in groups: all that was made from one of them is in a group before it."""
    known, made = {each.key: each for each in found}, users(found)
    order = TopologicalSorter({key: [child.key for child in made.get(key, ())] for key in known})
    levels = []
    try:
        order.prepare()
    except CycleError as error:
        raise StorageError(f"{error.args[1][0]}: was made from itself, its manifest says; delete its folder") from error
    while order.is_active():
        ready = order.get_ready()
        levels.append([known[key] for key in ready])
        order.done(*ready)
    return levels


def _temporary(found: Sequence[Output], since: float) -> dict[str, int]:
    """Files that were being written when their writer was killed. Only local disks have them."""
    left: dict[str, int] = {}
    for each in found if found and uri.local_path(found[0].root) else ():
        for path, info in uri.infos(each.url).items():
            left_over = _TEMPORARY.fullmatch(path) or (path == BEGUN and each.state is State.FINISHED)
            if left_over and info["mtime"] <= since:
                left[uri.join(each.url, path)] = int(info["size"])
    return left
