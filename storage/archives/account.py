"""What becomes of the entries of an archive that are no images of a class: passed over and counted, or refused."""

import re
from collections.abc import Collection, Iterable

from storage.config import Config
from storage.errors import InputError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"})

HIDDEN = "hidden: the name begins with a dot"
SYSTEM = "made by a desktop, a disk or a NAS"
OUTSIDE = "file of no class"
IMAGE_OUTSIDE = "image of no class"
SPECIAL = "neither a file nor a folder"
FIELD = "field of a sample that is no label and not its image"
NO_SAMPLE = "neither an image nor the label of one"

_SYSTEM = frozenset(
    {
        *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin", "lost+found"),
        *("system volume information", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
    }
)
_DOCUMENTS = frozenset(
    {
        *("cls", "csv", "eps", "h5", "hdf5", "html", "ico", "json", "log", "m", "mat", "md", "npy", "npz", "pdf"),
        *("pkl", "ps", "pt", "py", "rst", "safetensors", "svg", "toml", "tsv", "txt", "xml", "yaml", "yml"),
    }
)
_ARCHIVES = (".tar", ".parquet", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("eval", "evaluation"), "evaluation"),
    **dict.fromkeys(("held_out", "heldout", "held-out", "holdout"), "held out"),
}
_WORD = re.compile(r"[A-Za-z]+")
_CHOICE = re.compile(r"\{([^{}]+)\}")
_HUB_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.\w+", re.ASCII)


class PassedOver(Config):
    """Entries of an archive that are not read, for one reason."""

    reason: str
    """Why they are not read, in a few words."""
    count: int
    """Number of entries; a folder counts once."""
    first: str
    """Path in the archive of the first of them by name."""


class SplitAccount(Config):
    """What is in an archive besides the images that are read, and how it was understood."""

    passed_over: tuple[PassedOver, ...]
    """What is not read, by reason."""
    notes: tuple[str, ...]
    """How the archive was understood, one line each, where others might expect something else."""

    def lines(self) -> list[str]:
        """One line each, for people."""
        passed = [f"passed over: {item.count:,} {item.reason} (first: {item.first})" for item in self.passed_over]
        return passed + list(self.notes)


class Account:
    """Counts what is passed over in an archive, by reason, and says how the rest was understood.

    Args:
        where: URL of the archive, for errors.

    Attributes:
        notes: how the archive was understood, one line each, where others might expect something else.
        top: the folder that holds the class folders, with a slash at its end, or empty.
    """

    def __init__(self, where: str) -> None:
        self.where = where.rstrip("/")
        self.notes = list[str]()
        self.top = ""
        self._counts: dict[str, tuple[int, str]] = {}
        self._unseen = set[str]()

    def closed(self) -> SplitAccount:
        """What was counted and noted."""
        counts = sorted(self._counts.items())
        passed_over = (PassedOver(reason=reason, count=count, first=shown(first)) for reason, (count, first) in counts)
        return SplitAccount(passed_over=tuple(passed_over), notes=tuple(self.notes))

    def pass_over(self, reason: str, path: str) -> None:
        """Count an entry that is not read."""
        count, first = self._counts.get(reason, (0, path))
        self._counts[reason] = count + 1, min(first, path)

    def sees(self, path: str) -> bool:
        """Whether an entry is to be looked at; if not, it, or the folder that hides it, is counted."""
        parts = path.split("/")
        for depth, part in enumerate(parts, 1):
            reason = HIDDEN if part.startswith(".") else SYSTEM if part.lower() in _SYSTEM else None
            if reason is not None:
                hidden = "/".join(parts[:depth])
                if hidden not in self._unseen:
                    self._unseen.add(hidden)
                    self.pass_over(reason, hidden)
                return False
        return True

    def pass_over_beside(self, paths: Iterable[str]) -> None:
        """Count files that lie beside the class folders, class tars or other files that are read.

        Raises:
            InputError: one is an archive, which may hold images.
        """
        for path in paths:
            if is_archive_name(path):
                raise self.refused(
                    path, "an archive that would not be read with this folder; name it alone, or move it away"
                )
            self.pass_over(IMAGE_OUTSIDE if is_image_name(path) else OUTSIDE, path)

    def note(self, what: str, names: Collection[str]) -> None:
        """Note how many files are understood in a way that others might not expect, if there are any.

        Args:
            what: how they are understood.
            names: their names.
        """
        if names:
            self.notes.append(f"{what}: {len(names):,} (first: {shown(self.top + min(names))})")

    def add(self, other: "Account", inside: str = "") -> None:
        """Count what was passed over in a part of the archive, such as one of its tars.

        Args:
            other: the account of the part.
            inside: path of the part in the archive, with a slash at its end; empty for the whole.
        """
        for reason, (count, first) in other._counts.items():
            before, earlier = self._counts.get(reason, (0, inside + first))
            self._counts[reason] = before + count, min(earlier, inside + first)

    def refused(self, path: str, problem: str) -> InputError:
        """The error for an entry."""
        return InputError(f"{self.where}/{shown(path)}: {problem}")


def shown(name: str) -> str:
    """A name from an archive as it may be printed and stored: with escapes for what is not printable."""
    return name if name.isprintable() else ascii(name)[1:-1]


def is_image_name(path: str) -> bool:
    """Whether a file has the ending of an image that can be read."""
    return path.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def is_document_name(path: str) -> bool:
    """Whether a file has the ending of text, numbers or drawings."""
    return path.rpartition(".")[2].lower() in _DOCUMENTS


def is_archive_name(path: str) -> bool:
    """Whether a file has the ending of an archive, so that it may hold images of its own."""
    return path.lower().endswith(_ARCHIVES)


def split_of(name: str) -> str | None:
    """The split that a folder is named after; None if its name means no split."""
    return _SPLITS.get(name.lower())


def check_splits(where: str, folders: Iterable[str]) -> None:
    """Check that folders, or tars of one class each, are not the splits of a data set.

    A class may have the name of a split, such as ``train``; two of them are splits.

    Raises:
        InputError: two have names of different splits.
    """
    found = {split: name for name in sorted(folders) if (split := split_of(name)) is not None}
    if len(found) > 1:
        one, other, *_ = sorted(found.values())
        remedy = "make each an archive of its own, archive.train and archive.held_out"
        raise InputError(f"{where}: {one!r} and {other!r} are splits of a data set, not classes; {remedy}")


def check_one_split(where: str, names: Iterable[str]) -> None:
    """Check that the files of a folder or pattern are of one split of a data set, as far as their names tell.

    Several splits may be named in braces, as ``{train,val}-*.tar``.

    Raises:
        InputError: files are named after different splits, as ``train-00000.tar`` and ``val-00000.tar``, or only some
            after a split.
    """
    found: dict[object, tuple[str, str]] = {}
    for name in sorted(names):
        split, pattern = _split_in(name)
        found.setdefault(split, (name, pattern))
    named = [word for choice in _CHOICE.findall(where) for word in choice.split(",")]
    if len(found) > 1 and not all(any(word in name for word in named) for name, _ in found.values()):
        (one, _), (other, _), *_ = found.values()
        pattern = next(pattern for split, (_, pattern) in found.items() if split is not None)
        folder = where.rpartition("/")[0] if "*" in where else where
        text = f"{one} and {other} may be of different splits, which must not be mixed"
        raise InputError(f"{where}: {text}; name one split, such as {folder}/{pattern}")


def _split_in(name: str) -> tuple[object, str]:
    """What tells the split of a file from others, None if nothing does; and a pattern for the names of one split."""
    ending = name[name.rfind(".") :] if "." in name else ""
    words = [match for match in _WORD.finditer(name) if split_of(match[0])]
    if words:
        return frozenset(split_of(match[0]) for match in words), f"{name[: words[-1].end()]}*{ending}"
    match = _HUB_NAME.fullmatch(name)
    return (match[1], f"{match[1]}-*{ending}") if match else (None, name)
