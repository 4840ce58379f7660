"""Tables as plain text, the same on a terminal and in a pipe: one line for each row."""

from collections.abc import Container, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from storage import uri

_UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "min": timedelta(minutes=1)}


def aligned(rows: Sequence[Sequence[str]], numbers: Container[int] = ()) -> Iterator[str]:
    """One line for each row, with all columns aligned.

    Args:
        rows: the cells, with those of the header; all rows have the same number.
        numbers: indices of the columns that are aligned to the right.
    """
    shown = [[uri.printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        padded = zip(row, widths, range(len(widths)), strict=True)
        yield "  ".join(f"{cell:{'>' if place in numbers else '<'}{width}}" for cell, width, place in padded).rstrip()


def cost(values: Mapping[str, Any]) -> str:
    """What an output has cost, as `storage.root.Spent` has it in JSON."""
    hours, joules = f"{values['device_seconds'] / 3600:,.3g} device-hours", values["energy_joules"]
    energy = "energy not known" if joules is None else f"{joules / 3.6e6:,.3g} kWh"
    return f"cost {hours}, peak memory {values['peak_memory'] / 2**30:,.3g} GiB, {energy}"


def size(count: int) -> str:
    """A number of bytes, such as ``1.5 GB``."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def age(moment: datetime) -> str:
    """How long ago something was, such as ``3 h``. Clocks may differ, so what is yet to come is ``0 s`` ago."""
    passed = max(datetime.now(moment.tzinfo) - moment, timedelta())
    unit = next((name for name, least in _UNITS.items() if passed >= least), "s")
    return f"{passed // _UNITS.get(unit, timedelta(seconds=1))} {unit}"
