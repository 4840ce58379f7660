"""Is an output still what was committed? If not, it is taken back, and its stage makes anew what is damaged."""

from dataclasses import dataclass

from pydantic import ConfigDict

from storage import records, uri
from storage.errors import InputError, StorageError
from storage.manifest import FileEntry, Manifest, finished_outputs, is_finished, output_folder
from storage.parallel import threads

WITHDRAWN = "manifest.withdrawn.json"
"""Where the manifest of a damaged output is kept."""


@dataclass(frozen=True)
class Fault:
    """One damaged object."""

    entry: FileEntry
    state: str
    """What is wrong with it, as in: the object *is missing*."""


class _AnyRecord(records.Record):
    model_config = ConfigDict(extra="ignore")


def outputs(url: str) -> list[Manifest]:
    """The finished outputs at a URL: the one whose manifest or folder it is, or all of a root.

    Raises:
        InputError: there is none, or a manifest cannot be read.
        StorageError: the store does not answer.
    """
    folder = output_folder(url)
    if is_finished(folder):
        return [Manifest.read(folder)]
    manifests = [Manifest.read(output) for stage in uri.names(folder) for output in finished_outputs(folder, stage)]
    if not manifests:
        raise InputError(f"{uri.redact(url)}: no finished output there; name a manifest, its folder, or a root")
    return manifests


def faults(manifest: Manifest, *, full: bool) -> list[Fault]:
    """The damaged objects of an output.

    Args:
        manifest: of the output.
        full: read everything and compare hashes; without it the commit records alone, and all else's sizes.

    Raises:
        StorageError: the store does not answer.
    """
    return [Fault(entry, state) for entry, state in manifest.damaged(lambda entry: full or _is_record(entry))]


def withdraw(manifest: Manifest, found: list[Fault]) -> None:
    """Take a damaged output back: it has no manifest any more, and its damaged units no record.

    So no reader takes it, and the command that made it makes those units anew and all others not.
    The old manifest is kept beside, for whom it may concern.

    Raises:
        StorageError: the store refuses.
    """
    damaged = {fault.entry.path for fault in found}
    undone = [entry.path for entry in manifest.files if _is_record(entry) and _covers(manifest, entry, damaged)]
    uri.write(uri.join(manifest.uri, WITHDRAWN), uri.read(manifest.url))
    with threads(16) as pool:
        list(pool.map(lambda path: uri.remove_tree(uri.join(manifest.uri, path)), undone))
    uri.remove_tree(manifest.url)  # last: a kill before leaves an output that is still found to be damaged


def _is_record(entry: FileEntry) -> bool:
    return entry.path.startswith(f"{records.FOLDER}/")


def _covers(manifest: Manifest, entry: FileEntry, damaged: set[str]) -> bool:
    """Whether a record is damaged, or one of its objects is."""
    if entry.path in damaged:
        return True
    try:
        record = _AnyRecord.model_validate_json(manifest.read_object(entry.path))
    except StorageError:  # damaged since it was looked at
        return True
    return any(file.path in damaged for file in record.files)
