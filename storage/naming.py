"""Names of outputs: the digest and folder of each, and which are finished. Import them from `storage.manifest`."""

import json
from collections.abc import Mapping
from typing import Any

from storage import uri
from storage.config import Config
from storage.header import short_digest
from storage.parallel import threads
from storage.seal import json_digest

MANIFEST = "manifest.json"
BEGUN = "begun.json"
"""File with the header of an output that has no manifest yet."""
WITHDRAWN = "manifest.withdrawn.json"
"""Name that the manifest of a damaged output is kept under."""


def output_folder(url: str) -> str:
    """The folder of an output, given its URL or that of its manifest."""
    return uri.parent(url) if url.rpartition("/")[2] == MANIFEST else url.rstrip("/")


def key_of(folder: str) -> str:
    """The path of an output below its root, ``stage/name``."""
    return "/".join(folder.rstrip("/").split("/")[-2:])


def is_finished(folder: str) -> bool:
    """Whether an output's folder holds a manifest.

    Raises:
        StorageError: the store does not answer.
    """
    return uri.exists(uri.join(folder, MANIFEST))


def is_withdrawn(folder: str) -> bool:
    """Whether an output was found damaged and withdrawn, and is not made again yet.

    Raises:
        StorageError: the store does not answer.
    """
    return uri.exists(uri.join(folder, WITHDRAWN)) and not is_finished(folder)


def finished_outputs(root: str, stage: str) -> list[str]:
    """The folders of the finished outputs of a stage below a root, sorted by name.

    Raises:
        StorageError: the store does not answer.
    """
    folder = uri.join(uri.absolute(root), stage)
    folders = [uri.join(folder, name) for name in uri.names(folder)]
    with threads(16) as pool:
        return [folder for folder, finished in zip(folders, pool.map(is_finished, folders), strict=True) if finished]


def named_digest(stage: str, version: int, config: Config, inputs: Mapping[str, str], rerun: int = 0) -> str:
    """The digest of an output: of all that decides what it is."""
    identity = {"stage": stage, "version": version, "config": config.identity(), "inputs": dict(inputs)}
    return json_digest(identity | ({"rerun": rerun} if rerun else {}))


def shown(config: Config) -> dict[str, Any]:
    """A config as manifests record it, without secrets."""
    values: dict[str, Any] = uri.redact_json(json.loads(config.model_dump_json()))
    return values


def folder_of(root: str, stage: str, digest: str) -> str:
    """The folder of an output."""
    return uri.join(uri.absolute(root), stage, short_digest(digest))
