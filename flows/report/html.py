"""Pieces of a page that needs nothing but itself. Text is escaped, pictures lie in the page."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
img { max-width: 100%; min-width: min(100%, 24rem); image-rendering: pixelated }
figure { margin: 1rem 0 } figcaption { color: #555 } .lead { font-size: 1.3rem }
div.wide { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; font-size: .9rem }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
td:last-child { overflow-wrap: anywhere } .n { text-align: right; font-variant-numeric: tabular-nums }
div.strips { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .3rem 1rem; align-items: center }
div.strips img { width: 100%; min-width: 0; display: block }
img.plot { image-rendering: auto; background: white }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #e4e4e4 } figcaption { color: #aaa } td, th { border-color: #3a3d44 }
}
</style>
"""


def section(title: str, *parts: str) -> str:
    """A heading and what is below it."""
    return "\n".join([f"<h2>{escape(title)}</h2>", *parts])


def paragraph(text: str, kind: str = "") -> str:
    """Some text, of a class of the style sheet."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def figure(png: bytes, caption: str, kind: str = "") -> str:
    """A picture with its caption, of a class of the style sheet."""
    return f"<figure>{_image(png, caption, kind)}<figcaption>{escape(caption)}</figcaption></figure>"


def strips(rows: Iterable[tuple[str, bytes]]) -> str:
    """Pictures below each other, each with a name before it."""
    cells = "".join(f"<span>{escape(name)}</span>{_image(png, name)}" for name, png in rows)
    return f'<div class="strips">{cells}</div>'


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """A table, in which a column of numbers stands to the right."""
    kinds = [' class="n"' if all(map(_is_number, column)) else "" for column in zip(*rows, strict=True)]
    lines = [_row("th", head, kinds), *(_row("td", row, kinds) for row in rows)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _image(png: bytes, text: str, kind: str = "") -> str:
    data, kind = base64.b64encode(png).decode(), f' class="{kind}"' if kind else ""
    return f'<img{kind} alt="{escape(text)}" src="data:image/png;base64,{data}">'


def _row(tag: str, cells: Sequence[str], kinds: Sequence[str]) -> str:
    inside = "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for text, kind in zip(cells, kinds, strict=True))
    return f"<tr>{inside}</tr>"


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "", 1).lstrip("-").isdigit()
