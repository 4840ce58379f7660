"""Tables as plain text: the same on a terminal and in a pipe, a line a row."""

from collections.abc import Container, Iterator, Sequence


def aligned(rows: Sequence[Sequence[str]], numbers: Container[int] = ()) -> Iterator[str]:
    """Rows of equally many cells, a line each, with all columns aligned.

    Args:
        rows: the cells, those of the head among them.
        numbers: the columns that stand to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = zip(row, widths, range(len(widths)), strict=True)
        yield "  ".join(f"{cell:{'>' if place in numbers else '<'}{width}}" for cell, width, place in padded).rstrip()
