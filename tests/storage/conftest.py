import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from recorder import Recorder

from storage.config import Config
from storage.manifest import Manifest, StageOutput, stage_output


class Plain(Config):
    """A config for stages that exist only here."""

    value: int = 1


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def encoded(pixels: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def encode_image() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of an empty store that is not a local path."""
    fs = fsspec.filesystem("memory")
    fs.rm("/", recursive=True) if fs.ls("/") else None
    yield "memory://root"
    fs.rm("/root", recursive=True) if fs.exists("/root") else None


@pytest.fixture
def write_archive() -> Callable[..., Path]:
    """Writes a folder of class folders of random pictures."""

    def write(folder: Path, classes: Mapping[str, int], side: int = 20, seed: int = 0) -> Path:
        generator = np.random.default_rng(seed)
        for name, count in classes.items():
            (folder / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (side, side + 3, 3), np.uint8)
                form = "JPEG" if number % 2 else "PNG"
                (folder / name / f"{number:03d}.JPEG").write_bytes(encoded(pixels, form))
        return folder

    return write


@pytest.fixture
def new_output() -> Callable[..., StageOutput]:
    def make(root: Path | str, stage: str = "plain", value: int = 1) -> StageOutput:
        return stage_output(str(root), stage, 1, Plain(value=value), parents={}, inputs={})

    return make


@pytest.fixture
def committed(new_output: Callable[..., StageOutput]) -> Callable[..., Manifest]:
    """Commits a small output of two objects."""

    def make(root: Path | str, stage: str = "plain") -> Manifest:
        out = new_output(root, stage)
        return out.commit(Manifest, [out.put("b/two", b"22"), out.put("one", b"1")])

    return make
