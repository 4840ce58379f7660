"""Checks whether outputs still are what was committed, and withdraws damaged ones so that their stage repairs them."""

from dataclasses import dataclass

from pydantic import ConfigDict

from storage import records, uri
from storage.errors import InputError, StorageError
from storage.manifest import FileEntry, Manifest, finished_outputs, is_finished, output_folder
from storage.parallel import threads

WITHDRAWN = "manifest.withdrawn.json"
"""Name that the manifest of a damaged output is kept under."""


@dataclass(frozen=True)
class Fault:
    """A damaged object."""

    entry: FileEntry
    damage: str
    """What is wrong with it, such as ``is missing``."""


class _AnyRecord(records.Record):
    model_config = ConfigDict(extra="ignore")


def outputs(url: str) -> list[Manifest]:
    """The finished outputs at a URL.

    Args:
        url: a manifest or its folder, for one output; or a root, for all outputs below it.

    Raises:
        InputError: there is no output, or a manifest cannot be read.
        StorageError: the store does not answer.
    """
    folder = output_folder(url)
    if is_finished(folder):
        return [Manifest.read(folder)]
    manifests = [Manifest.read(output) for stage in uri.names(folder) for output in finished_outputs(folder, stage)]
    if not manifests:
        raise InputError(f"{uri.redact(url)}: no finished output found; give a manifest, its folder, or a root")
    return manifests


def faults(manifest: Manifest, *, full: bool) -> list[Fault]:
    """The damaged objects of an output.

    Args:
        manifest: the output's manifest.
        full: compare every object with its hash. Otherwise only the commit records are compared, and of
            all other objects only the size is checked.

    Raises:
        StorageError: the store does not answer.
    """
    return [Fault(entry, damage) for entry, damage in manifest.damaged(lambda entry: full or _is_record(entry))]


def withdraw(manifest: Manifest, damaged: list[Fault]) -> None:
    """Remove the manifest of a damaged output and the records of its damaged units.

    Readers then refuse the output, and the command that made it repeats the damaged units and no others.
    The manifest is kept as `WITHDRAWN`.

    Raises:
        StorageError: the store refuses.
    """
    paths = {fault.entry.path for fault in damaged}
    to_repeat = [entry.path for entry in manifest.files if _is_record(entry) and _covers(manifest, entry, paths)]
    uri.write(uri.join(manifest.uri, WITHDRAWN), uri.read(manifest.url))
    with threads(16) as pool:
        list(pool.map(lambda path: uri.remove_tree(uri.join(manifest.uri, path)), to_repeat))
    uri.remove_tree(manifest.url)  # last: after a kill before this line, the output still counts as damaged


def _is_record(entry: FileEntry) -> bool:
    return entry.path.startswith(f"{records.FOLDER}/")


def _covers(manifest: Manifest, entry: FileEntry, damaged: set[str]) -> bool:
    """Whether a record or one of its objects is damaged."""
    if entry.path in damaged:
        return True
    try:
        record = _AnyRecord.model_validate_json(manifest.read_object(entry.path))
    except StorageError:  # damaged since the check
        return True
    return any(file.path in damaged for file in record.files)
