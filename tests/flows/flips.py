"""Bit rot: single bits of an output's files that change."""

from pathlib import Path

import numpy as np

from storage.errors import DitflowError
from storage.manifest import Manifest
from storage.verify import faults


def unnoticed(output: Manifest, *, each: int, seed: int = 0) -> list[str]:
    """The flips that ``ditflow verify --full`` would not notice, of ``each`` random ones in every file and manifest."""
    random, folder = np.random.default_rng(seed), Path(output.uri)
    missed = []
    for path in [Path(output.url), *(folder / entry.path for entry in output.files)]:
        data = path.read_bytes()
        for _ in range(each if data else 0):
            place, bit = int(random.integers(len(data))), int(random.integers(8))
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            if not _noticed(folder):
                missed.append(f"{path}: bit {bit} of byte {place}")
        path.write_bytes(data)
    return missed


def _noticed(folder: Path) -> bool:
    try:
        return bool(faults(Manifest.read(str(folder)), full=True))
    except DitflowError:
        return True
