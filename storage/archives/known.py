"""Digests of archives. Tars, zips and Parquet files that this machine has listed are not listed again.

What was listed is kept in the cache with the versions of the files: size, times and inode, or ETag. A folder of images
has no version, so it is listed each time.
"""

from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, TypeAdapter

from storage import uri
from storage.archives.open import ArchiveRef, open_splits
from storage.archives.patterns import expand
from storage.rows import cache

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_DIGESTS: Final = TypeAdapter(Annotated[dict[str, Digest], Field(min_length=1)])


def input_digests(archive: ArchiveRef) -> dict[str, str]:
    """The digest of each archive by split.

    Raises:
        InputError, StorageError: as `open_archive`.
    """
    versions = _versions(archive)
    if versions is None:
        return _listed(archive)
    place = archive.absolute().model_dump(mode="json")
    path = cache.entry_path(None, "listed", [_rules(), place, versions])
    try:
        return _DIGESTS.validate_json(path.read_bytes())
    except (OSError, ValueError):  # never listed, or damaged
        digests = _listed(archive)
    if _versions(archive) == versions:
        uri.write(str(path), _DIGESTS.dump_json(digests))
    return digests


def _rules() -> str:
    """The hash of the code that lists."""
    return uri.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


def _listed(archive: ArchiveRef) -> dict[str, str]:
    return {split: source.digest for split, source in open_splits(archive).items()}


def _versions(archive: ArchiveRef) -> dict[str, dict[str, str]] | None:
    """The version of each file by URL; None if one is no file, or its store gives no version."""
    versions: dict[str, dict[str, str]] = {}
    for url in (archive.train, archive.held_out, archive.held_out_labels):
        for file in () if url is None else expand(url) or [url]:
            if uri.chain(file)[0] or uri.is_folder(file):
                return None
            version = uri.version(file)
            if not version:
                return None
            versions[file] = version
    return versions
