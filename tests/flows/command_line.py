"""The command, called in this process, on images of one's own."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.command.main import main

SIDE = 16


def write_images(folder: Path, classes: int = 3, count: int = 8) -> Path:
    """Folders of PNG files; the brightness tells the class."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 60, (SIDE, SIDE, 3)) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{label}" / f"{index:03d}.png")
    return folder


def tiny(images: Path, root: Path | str, *more: str) -> list[str]:
    """Options that make the demo's recipe small, on images of one's own."""
    values = [
        f"archive.train={images}",
        "archive.held_out=null",
        f"encode.resolution={SIDE}",
        "train.steps=2",
        "train.batch_size=4",
        "sample.count=6",
        "sample.steps=2",
        *more,
    ]
    return ["--root", str(root), *(part for value in values for part in ("--set", value))]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """Run the command, see that it exits with the code and one line of its own, and return the line."""
    assert main(arguments) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "fault: "))]
    assert len(lines) == 1
    return lines[0]
