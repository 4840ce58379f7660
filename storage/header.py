"""The parts of a manifest that are known before the work is done, and the entries of its files."""

from typing import Any

from pydantic import ConfigDict, Field, field_validator

from storage.config import Config


class FileEntry(Config):
    """A committed object of a stage."""

    path: str
    """Path below the stage's folder."""
    size: int = Field(ge=0)
    """Size in bytes."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the bytes, 64 hex digits."""

    @field_validator("path")
    @classmethod
    def _stays_below(cls, path: str) -> str:
        if not path or path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"{path!r} is outside the stage's folder")
        return path


class Parent(Config):
    """Another stage's output that an output was made from."""

    digest: str
    uri: str
    """Its folder at that time."""
    content: str
    """Its `Manifest.content` at that time."""
    cached: bool = False
    """Whether it is kept for others and measured again when it is gone. Its digest is no input."""


class Provenance(Config):
    """The runs that made an output. Not part of the digest."""

    name: str | None = None
    """Of the run, for people; None is that of the stage."""
    mlflow_run_id: str | None = None
    prefect_flow_run_id: str | None = None
    prefect_flow_run_url: str | None = None
    pipeline_id: str | None = None


class Header(Config):
    """The part of a manifest that is known before the work begins."""

    model_config = ConfigDict(extra="ignore")  # so that the manifest of any stage can be read as a header

    stage: str
    version: int
    digest: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Digest of each input by name: parents' manifests, archives, weights."""
    parents: dict[str, Parent]
    rerun: int = 0
    """Number of this forced repetition of the same work; 0 for the first output."""
    provenance: Provenance = Provenance()

    @property
    def contents(self) -> dict[str, str]:
        """`Manifest.content` of each parent, by name."""
        return {name: parent.content for name, parent in self.parents.items()}

    @property
    def folder_name(self) -> str:
        """Name of the output's folder below that of its stage."""
        return short_digest(self.digest)


def short_digest(digest: str) -> str:
    """The first 16 digits of a digest, which name an output in folders, jobs and tables."""
    return digest[:16]
