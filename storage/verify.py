"""Checks whether outputs still are what was committed, and withdraws damaged ones so that their stage repairs them."""

from dataclasses import dataclass

from pydantic import ConfigDict

from storage import cost, records, uri
from storage.errors import DitflowError, InputError, StorageError
from storage.header import FileEntry
from storage.manifest import BEGUN, MANIFEST, WITHDRAWN, Manifest, finished_outputs, is_finished, output_folder
from storage.parallel import threads
from storage.root import folders

JOBS = "slurm"
"""Folder in an output with what a job of Slurm has left."""
BESIDE = (MANIFEST, WITHDRAWN, BEGUN, "records/batch_size", "tracking-unsent.jsonl")
"""Files that stages and their tracking keep in an output's folder beside what is committed."""


@dataclass(frozen=True)
class Fault:
    """A damaged object."""

    entry: FileEntry
    damage: str
    """What is wrong with it, such as ``is missing``."""
    compared: bool = True
    """False if it could not be read, so nobody knows whether it is damaged."""


class _AnyRecord(records.Record):
    model_config = ConfigDict(extra="ignore")


def outputs(url: str) -> list[Manifest | DitflowError]:
    """The finished outputs at a URL; in the place of a manifest or stage that cannot be read, the error.

    What an output was made from is compared with what it recorded. A parent that is gone or differs is an error too.

    Args:
        url: a manifest or its folder, for one output and all that it was made from, down to the shards; or a root, for
            all outputs below it.

    Raises:
        InputError: there is no output.
        StorageError: the store does not answer.
    """
    folder = output_folder(url)
    if is_finished(folder):
        return _chain(folder)
    found = [output for stage in folders(folder) for output in _outputs_of(folder, stage)]
    if not found:
        raise InputError(f"{uri.redact(url)}: no finished output found; give a manifest, its folder, or a root")
    return found + [parent for output in found for parent in _parents(output) if isinstance(parent, DitflowError)]


def faults(manifest: Manifest, *, full: bool) -> list[Fault]:
    """The damaged objects of an output, and those that cannot be read.

    Args:
        manifest: the output's manifest.
        full: compare every object with its hash. Otherwise only the commit records are compared, and of
            all other objects only the size is checked.
    """
    with threads(16) as pool:
        found = pool.map(lambda entry: _fault(manifest, entry, full=full or _is_record(entry)), manifest.files)
        return [fault for fault in found if fault]


def uncommitted(manifest: Manifest) -> list[str]:
    """The paths of the files in an output's folder that neither its manifest nor a commit record names.

    Raises:
        StorageError: the store does not answer.
    """
    known = {entry.path for entry in manifest.files}
    others = [path for path in uri.tree(manifest.uri) if path not in known and not _is_beside(path)]
    committing = {path: _record(uri.read(uri.join(manifest.uri, path))) for path in others if path.endswith(".json")}
    for path, record in committing.items():
        known |= {path, *(entry.path for entry in record.files)} if record else set()
    return [path for path in others if path not in known]


def stray(root: str, known: frozenset[str]) -> list[str]:
    """What lies in a root and belongs to no finished output, as paths below it: files, and folders as a whole.

    Args:
        root: folder of all outputs.
        known: names in the root that others of this product use.

    Raises:
        StorageError: the store does not answer.
    """
    found = []
    for stage in folders(root):
        finished = set() if stage in known else {uri.name(folder) for folder in finished_outputs(root, stage)}
        if finished:
            found += [f"{stage}/{name}" for name in uri.names(uri.join(root, stage)) if name not in finished]
        elif stage not in known:
            found.append(stage)
    return found


def withdraw(manifest: Manifest, damaged: list[Fault]) -> None:
    """Remove the manifest of a damaged output and the records of its damaged units.

    Readers then refuse the output, and the command that made it repeats the damaged units and no others.
    The manifest is kept as `WITHDRAWN`.

    Raises:
        StorageError: the store refuses, or a symbolic link leads out of the output; nothing is removed then.
    """
    paths = {fault.entry.path for fault in damaged}
    to_repeat = [entry.path for entry in manifest.files if _is_record(entry) and _covers(manifest, entry, paths)]
    removed = [uri.join(manifest.uri, path) for path in to_repeat]
    removed.append(uri.join(manifest.uri, JOBS))  # what is noted there of a job is not of the one that repairs
    for url in (*removed, manifest.url):
        uri.check_no_link(url, manifest.root)
    uri.write(uri.join(manifest.uri, WITHDRAWN), uri.read(manifest.url))
    with threads(16) as pool:
        list(pool.map(lambda url: uri.remove_tree(url, manifest.root), removed))
    # Last: after a kill before this line, the output still counts as damaged.
    uri.remove_tree(manifest.url, manifest.root)


def _chain(folder: str) -> list[Manifest | DitflowError]:
    """An output and all that it was made from, itself first, each once."""
    found, known = [_read(folder)], {folder}
    for output in found:  # which grows
        for parent in _parents(output):
            if isinstance(parent, DitflowError) or parent.uri not in known:
                found.append(parent)
            known |= set() if isinstance(parent, DitflowError) else {parent.uri}
    return found


def _parents(output: Manifest | DitflowError) -> list[Manifest | DitflowError]:
    if isinstance(output, DitflowError):
        return []
    found = [_parent(output, name) for name in output.parents]
    return [parent for parent in found if parent is not None]


def _parent(output: Manifest, name: str) -> Manifest | DitflowError | None:
    """A parent, or why it cannot be read; None if it was only cached and is gone."""
    try:
        gone = output.parents[name].cached and not output.has(name)
        return None if gone else output.parent(name, Manifest)
    except DitflowError as error:
        return error


def _outputs_of(root: str, stage: str) -> list[Manifest | DitflowError]:
    try:
        return [_read(folder) for folder in finished_outputs(root, stage)]
    except DitflowError as error:
        return [error]


def _read(folder: str) -> Manifest | DitflowError:
    try:
        return Manifest.read(folder)
    except DitflowError as error:
        return error


def _fault(manifest: Manifest, entry: FileEntry, *, full: bool) -> Fault | None:
    try:
        damage = manifest.damage(entry, full=full)
    except StorageError as error:
        return Fault(entry, f"cannot be checked: {error}", compared=False)
    return Fault(entry, damage) if damage else None


def _is_beside(path: str) -> bool:
    return path in BESIDE or path.startswith((f"{cost.FOLDER}/", f"{JOBS}/"))


def _is_record(entry: FileEntry) -> bool:
    return entry.path.startswith(f"{records.FOLDER}/")


def _covers(manifest: Manifest, entry: FileEntry, damaged: set[str]) -> bool:
    """Whether a record or one of its objects is damaged."""
    if entry.path in damaged:
        return True
    try:
        record = _record(manifest.read_object(entry.path))
    except StorageError:  # damaged since the check
        return True
    return record is None or any(file.path in damaged for file in record.files)


def _record(data: bytes) -> _AnyRecord | None:
    """The commit record in a file; None if it is none."""
    try:
        return records.parse(data, _AnyRecord)
    except ValueError:
        return None
