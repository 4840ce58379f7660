"""Tables as plain text, the same on a terminal and in a pipe: one line for each row."""

from collections.abc import Container, Iterator, Sequence


def aligned(rows: Sequence[Sequence[str]], numbers: Container[int] = ()) -> Iterator[str]:
    """One line for each row, with all columns aligned.

    Args:
        rows: the cells, with those of the header; all rows have the same number.
        numbers: indices of the columns that are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = zip(row, widths, range(len(widths)), strict=True)
        yield "  ".join(f"{cell:{'>' if place in numbers else '<'}{width}}" for cell, width, place in padded).rstrip()
