"""A page as data, rendered to one HTML file: text is escaped, pictures are embedded. Also text in Markdown."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATE = "page.html"


@dataclass(frozen=True)
class Figure:
    """A PNG with its caption."""

    png: bytes
    caption: str
    plot: bool = False
    """Whether it is a plot, which browsers may smooth when they scale it."""


@dataclass(frozen=True)
class Strips:
    """PNGs below each other, each with its name on the left."""

    strips: Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class Table:
    """Cells, and the names of their columns."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether all its cells are numbers; such columns are aligned to the right."""
        return [all(map(_is_number, column)) for column in zip(*self.rows, strict=True)]


@dataclass(frozen=True)
class Section:
    """A heading and its content; a string is a paragraph."""

    title: str
    parts: Sequence[str | Figure | Strips | Table]


def render(title: str, leads: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The HTML of a page: the same text for the same data.

    Args:
        title: of the page.
        leads: lines at the top, each in large letters, with a paragraph that explains it.
        sections: all that follows.
    """
    here = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=here, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template(TEMPLATE).render(title=title, leads=leads, sections=sections).lstrip() + "\n"


def markdown(text: str) -> str:
    """The text for Markdown, in which it has no tags, links or other meaning."""
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", html.escape(text, quote=False))


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "", 1).lstrip("-").isdigit()
