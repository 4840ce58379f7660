"""The pages of README and docs: fenced blocks, commands in the order in which they stand, and those in sentences."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
PATHS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
BLOCK = re.compile(
    r"^```([\w+-]*)\n(.*?)^```$|^ {4}((?:ditflow|make|\.venv/bin/\S+) [^\n]*)$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """A fenced block, or a command that stands alone as an indented line."""

    page: str
    number: int
    kind: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page} {self.number}"


def blocks() -> Iterator[Block]:
    for path in PATHS:
        for number, (kind, body, line) in enumerate(BLOCK.findall(path.read_text("utf-8")), 1):
            yield Block(str(path.relative_to(REPOSITORY)), number, "sh" if line else kind, line or body)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block as a shell reads them, without comments."""
    waiting = ""
    for line in text.replace("\\\n", " ").splitlines():
        waiting += f"{line}\n"
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        waiting = ""
        if words:
            yield words
    assert not waiting, f"an open quotation: {waiting}"


def sentences() -> Iterator[tuple[str, list[str]]]:
    """The commands within sentences: the page and the words of each."""
    for path in PATHS:
        for command in re.findall(r"`((?:ditflow|make)\s[^`]+)`", BLOCK.sub("", path.read_text("utf-8"))):
            yield str(path.relative_to(REPOSITORY)), shlex.split(command)


BLOCKS = list(blocks())
SENTENCES = list(sentences())
