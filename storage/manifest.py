"""Manifests: what a stage made, from which inputs, and the hashes of all its files.

A stage writes its output to ``root/<stage>/<first 16 digits of the digest>``. The manifest is written
last: a folder with a manifest is finished, and a folder without one is resumed by the same command.
The digest covers the stage's version, the config and the digests of the inputs, so an output has its
name before it exists. Locations are not part of the digest.

A manifest ends in the hash of its own bytes, and has the hash of each parent's content. So no byte of a chain of
outputs changes unnoticed.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import Field, PrivateAttr, ValidationError

from storage import uri
from storage.code_version import code_version
from storage.config import Config, problem
from storage.cost import Cost, spent
from storage.errors import InputError, StorageError
from storage.header import FileEntry, Header, Parent, Provenance
from storage.naming import BEGUN as BEGUN
from storage.naming import MANIFEST as MANIFEST
from storage.naming import WITHDRAWN as WITHDRAWN
from storage.naming import finished_outputs as finished_outputs
from storage.naming import folder_of, named_digest, shown
from storage.naming import is_finished as is_finished
from storage.naming import is_withdrawn as is_withdrawn
from storage.naming import key_of as key_of
from storage.naming import output_folder as output_folder
from storage.parallel import threads
from storage.seal import BrokenSealError, NeverSealedError, content, opened, sealed

FORMAT: Final = 2
MAX_BYTES = 2**28
"""Most bytes of a manifest; that of a set of a billion images has fewer."""
OTHER_BYTES = "does not hold the bytes that were committed"
OTHER_FORMAT = "go on with the version of ditflow that wrote it, or delete the folder and run the stage again"
REMEDY = f"delete {MANIFEST} there and run the stage again, which keeps what is done"


def withdrawn(folder: str) -> str:
    """What is to say of a withdrawn output."""
    stage = uri.name(uri.parent(folder))
    return f"was damaged, and `ditflow verify` has withdrawn it; run {stage} again, with the options that made it"


class Manifest(Header):
    """The record of a finished stage. Each stage adds its own fields in a subclass.

    ``counts`` are numbers of images, shards and the like; ``metrics`` are the results of an evaluation. Milestones have
    no ``cost`` of their own; it is in that of the training that passed them.
    """

    STAGE: ClassVar[str] = ""
    ALSO: ClassVar[tuple[str, ...]] = ()
    """Further stages, whose outputs are read as this kind, too."""

    format: Literal[2] = FORMAT
    files: tuple[FileEntry, ...]
    counts: dict[str, int] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    code_version: str
    created: datetime
    cost: Cost | None = None

    _uri: str = PrivateAttr("")
    _content: str = PrivateAttr("")

    @property
    def uri(self) -> str:
        """The stage's folder, which the manifest was read from."""
        return self._uri

    @property
    def url(self) -> str:
        """The URL of the manifest itself."""
        return uri.join(self._uri, MANIFEST)

    @property
    def root(self) -> str:
        """The folder of all outputs that this one belongs to."""
        return uri.parent(uri.parent(self._uri))

    @property
    def content(self) -> str:
        """SHA-256 of what was made and what from, 64 hex digits; empty for a manifest that is not written.

        It covers identity, inputs, parents' contents, files with their hashes, counts, metrics and the stage's own
        fields: all that can tell a child that it was made from something else. It does not cover pictures for people
        (``artifacts/``), nor the statistics of latents, which follow from the files, nor who made the output, when, how
        and where: the runs, the time, the cost, the version of the code, the config and all locations. So an output
        that was damaged, withdrawn and repaired by its stage has the same content, and its children stay valid, also if
        other workers, another machine or a moved archive took part. The config's part that decides the content is
        covered by the digest.
        """
        return self._content

    @classmethod
    def folder(cls, root: str, digest: str) -> str:
        """Where this stage's output with a digest lies below a root."""
        return folder_of(root, cls.STAGE, digest)

    def as_parent(self) -> Parent:
        """This output as an input of the next stage."""
        return Parent(digest=self.digest, uri=uri.redact(self.uri), content=self.content)

    @classmethod
    def read(cls, url: str) -> Self:
        """Read a committed manifest.

        Args:
            url: URL of the manifest or of its folder.

        Raises:
            InputError: there is no manifest, the file is not one or was changed, or it belongs to another stage.
        """
        folder = output_folder(url)
        try:
            data = uri.read(uri.join(folder, MANIFEST), MAX_BYTES)
        except StorageError as error:
            gone = isinstance(error.__cause__, FileNotFoundError) and is_withdrawn(folder)
            why = withdrawn(folder) if gone else f"no finished output ({error})"
            raise InputError(f"{uri.redact(folder)}: {why}") from error
        manifest = cls._parsed(data, uri.redact(folder))
        manifest._uri = uri.absolute(folder)
        return manifest

    @classmethod
    def _parsed(cls, data: bytes, where: str) -> Self:
        try:
            text = opened(data)
            stage = Header.model_validate_json(text).stage
            if cls.STAGE and stage not in (cls.STAGE, *cls.ALSO):
                raise InputError(f"{where}: an output of {stage!r}; one of {cls.STAGE!r} is needed")
            manifest = cls.model_validate_json(text)
        except NeverSealedError as error:
            raise InputError(f"{where}/{MANIFEST}: has an earlier format than {FORMAT}; {OTHER_FORMAT}") from error
        except BrokenSealError as error:
            raise InputError(f"{where}/{MANIFEST}: {OTHER_BYTES}; {REMEDY}") from error
        except ValidationError as error:
            raise InputError(f"{where}: not a stage manifest: {problem(error)}; {REMEDY}") from error
        manifest._content = content(text)
        return manifest

    def parent(self, name: str, kind: "type[AnyManifest]") -> "AnyManifest":
        """The manifest of a stage that this output was made from.

        The parent is searched for at its recorded URL, then below the same root as this output, so a
        root can be moved as a whole.

        Args:
            name: the parent's name among the inputs.
            kind: the parent's type of manifest.

        Raises:
            InputError: this output has no such parent, or the parent is gone, was replaced or made again otherwise.
        """
        if name not in self.parents:
            raise InputError(f"{uri.redact(self.uri)}: has no parent {name!r}")
        recorded = self.parents[name]
        folder = self._place_of(recorded) or recorded.uri
        manifest = kind.read(folder)
        if manifest.digest != recorded.digest:
            raise InputError(f"{uri.redact(folder)}: not the {name} that {uri.redact(self.uri)} was made from")
        if manifest.content != recorded.content:
            raise self.other_parent(name, folder)
        return manifest

    def has(self, name: str) -> bool:
        """Whether a parent is still there."""
        return self._place_of(self.parents[name]) is not None

    def _place_of(self, parent: Parent) -> str | None:
        stage = uri.name(uri.parent(parent.uri))
        places = (parent.uri, folder_of(self.root, stage, parent.digest))
        return next((folder for folder in places if is_finished(folder)), None)

    def other_parent(self, name: str, folder: str) -> InputError:
        """The error for a parent that was made again and differs from what this output was made from.

        Args:
            name: the parent's name among the inputs.
            folder: where it is now.
        """
        text = f"{uri.redact(self.uri)}: was made from other bytes than its {name} has now, {uri.redact(folder)}"
        return InputError(f"{text}; delete {MANIFEST} there and run {self.stage} again")

    def check_sizes(self) -> None:
        """Check that every committed object exists with its size.

        Raises:
            StorageError: an object is missing or has another size; the line names the first.
        """
        with threads(16) as pool:
            damages = pool.map(lambda entry: self.damage(entry, full=False), self.files)
            for entry, damage in zip(self.files, damages, strict=True):
                if damage:
                    raise self.fault(entry.path, damage)

    def read_object(self, path: str, most: int | None = None) -> bytes:
        """The bytes of a committed object, compared with its hash.

        Args:
            path: path of the object.
            most: bytes that such an object may have; a larger one is not read. None: any number.

        Raises:
            StorageError: the manifest does not list the object, or it is missing, too large or holds other bytes.
        """
        entry = next((entry for entry in self.files if entry.path == path), None)
        if entry is None:
            raise self.fault(path, "is not in the manifest")
        damage = self.damage(entry, full=False)
        if damage is None:
            data = uri.read(uri.join(self.uri, path), most)
            if uri.sha256(data) == entry.sha256:
                return data
        raise self.fault(path, damage or OTHER_BYTES)

    def damage(self, entry: FileEntry, *, full: bool) -> str | None:
        """What is wrong with an object, or None.

        Args:
            entry: the object.
            full: compare it with its hash, not only with its size.

        Raises:
            StorageError: it cannot be read.
        """
        url = uri.join(self.uri, entry.path)
        size = uri.size(url)
        if size is None:
            return "is missing"
        if size != entry.size:
            return f"has {size:,} bytes instead of {entry.size:,}"
        return OTHER_BYTES if full and uri.file_sha256(url) != entry.sha256 else None

    def fault(self, path: str, damage: str) -> StorageError:
        """The error for a damaged object.

        Args:
            path: path of the object.
            damage: what is wrong with it, such as ``is missing``.
        """
        url, folder = uri.redact(uri.join(self.uri, path)), uri.redact(self.uri)
        return StorageError(f"{url}: {damage}; run `ditflow verify --full {folder}`, then {self.stage} again")


AnyManifest = TypeVar("AnyManifest", bound=Manifest)


class StageOutput(Config):
    """The folder that a stage writes to, with the header of its future manifest."""

    uri: str
    header: Header

    @property
    def root(self) -> str:
        """The folder of all outputs that this one belongs to."""
        return uri.parent(uri.parent(self.uri))

    @property
    def name(self) -> str:
        """Name for jobs that make this output; the same work always has the same name."""
        return f"{self.header.stage}-{self.header.folder_name}"

    def made_by(self, **runs: str | None) -> "StageOutput":
        """The same output with other values in its provenance."""
        provenance = self.header.provenance.model_copy(update=runs)
        return self.model_copy(update={"header": self.header.model_copy(update={"provenance": provenance})})

    def using(self, cached: Mapping[str, Manifest]) -> "StageOutput":
        """The same output with further parents, which are kept for others too and are no part of its digest."""
        more = {name: kept.as_parent().model_copy(update={"cached": True}) for name, kept in cached.items()}
        header = self.header.model_copy(update={"parents": self.header.parents | more})
        return self.model_copy(update={"header": header})

    def with_config(self, config: Config) -> "StageOutput":
        """The first output of the same stage from the same inputs with another config. No MLflow run made it."""
        header = self.header
        digest = named_digest(header.stage, header.version, config, header.inputs)
        provenance = header.provenance.model_copy(update={"mlflow_run_id": None})
        changed = {"digest": digest, "config": shown(config), "rerun": 0, "provenance": provenance}
        folder = folder_of(self.root, header.stage, digest)
        return StageOutput(uri=folder, header=header.model_copy(update=changed))

    def url(self, *parts: str) -> str:
        """The URL of an object or folder in this folder."""
        return uri.join(self.uri, *parts)

    def begin(self) -> None:
        """Leave in the folder what the output will be and is made from, until the manifest says so. Raises as `put`."""
        uri.write(self.url(BEGUN), sealed(self.header.model_dump_json(indent=1).encode()))

    def put(self, path: str, data: bytes) -> FileEntry:
        """Write an object and return its entry for the manifest.

        Raises:
            StorageError: the disk is full or the store refuses.
        """
        uri.write(self.url(path), data)
        return FileEntry(path=path, size=len(data), sha256=uri.sha256(data))

    def describe(self, path: str) -> FileEntry:
        """The manifest's entry for an object that is already written.

        Raises:
            StorageError: the object is missing.
        """
        data = uri.read(self.url(path))
        return FileEntry(path=path, size=len(data), sha256=uri.sha256(data))

    def manifest(self, kind: type[AnyManifest], files: Iterable[FileEntry] = (), **fields: Any) -> AnyManifest:
        """The manifest of this output with these files and fields; nothing is written."""
        manifest = kind(
            **dict(self.header),
            files=tuple(sorted(files, key=lambda entry: entry.path)),
            code_version=code_version(),
            created=datetime.now(UTC),
            **fields,
        )
        manifest._uri = self.uri
        return manifest

    def commit(self, kind: type[AnyManifest], files: Iterable[FileEntry], **fields: Any) -> AnyManifest:
        """Write the manifest, which finishes the output, and return it as readers will see it.

        If another run has written a manifest meanwhile, that one is kept and returned.

        Raises:
            StorageError: the disk is full or the store refuses.
        """
        manifest = self.manifest(kind, files, cost=spent(self.uri), **fields)
        uri.create(self.url(MANIFEST), sealed(manifest.model_dump_json(indent=1).encode()))
        uri.remove_tree(self.url(BEGUN), self.uri)
        return kind.read(self.uri)

    def committed(self, kind: type[AnyManifest]) -> AnyManifest | None:
        """The manifest; None if this output is not finished.

        Raises:
            InputError: the manifest is refused, belongs to another output, or was made from other bytes of a parent.
        """
        if not is_finished(self.uri):
            return None
        manifest = kind.read(self.uri)
        if manifest.digest != self.header.digest:
            raise InputError(f"{uri.redact(self.uri)}: holds the manifest of another output; {REMEDY}")
        for name, parent in self.header.parents.items():
            if parent.content and parent.content != manifest.parents[name].content:
                raise manifest.other_parent(name, parent.uri)
        return manifest


def stage_output(
    root: str,
    stage: str,
    version: int,
    config: Config,
    *,
    parents: Mapping[str, Manifest],
    inputs: Mapping[str, str],
    force: bool = False,
    provenance: Provenance = Provenance(),  # noqa: B008  frozen
) -> StageOutput:
    """The output of a stage, in ``root/<stage>/<first 16 digits of the digest>``. Nothing is written.

    Args:
        root: folder of all outputs.
        stage: the stage's name.
        version: the stage's version, raised when the same inputs give other bytes.
        config: the stage's config.
        parents: manifests that the stage reads, by name.
        inputs: digests of all other inputs by name, such as archives and weights.
        force: name a new output beside the finished ones, instead of the first.
        provenance: the runs that make it.
    """
    digests = {name: parent.digest for name, parent in parents.items()} | dict(inputs)
    rerun = 0
    while True:
        digest = named_digest(stage, version, config, digests, rerun)
        folder = folder_of(root, stage, digest)
        if not force or not is_finished(folder):
            break
        rerun += 1
    header = Header(
        stage=stage,
        version=version,
        digest=digest,
        config=shown(config),
        inputs=digests,
        parents={name: parent.as_parent() for name, parent in parents.items()},
        rerun=rerun,
        provenance=provenance,
    )
    return StageOutput(uri=folder, header=header)
