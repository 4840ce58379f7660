"""`ditflow npz`: samples in one file, with no recipe and no server."""

from pathlib import Path

import numpy as np
import pytest

from dit.sample import SampleManifest, layout
from dit.samplers.config import SampleConfig
from flows.command.main import main
from storage.manifest import stage_output
from storage.rows.store import RowWriter

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
LABELS = np.array([2, 0, 1], np.int32)


@pytest.fixture
def samples(tmp_path: Path) -> str:
    """The folder of a finished stage."""
    config = SampleConfig(count=3, block_rows=2)
    out = stage_output(str(tmp_path / "root"), SampleManifest.STAGE, 1, config, parents={}, inputs={})
    writer = RowWriter(out, layout(3, 2, 8), {})
    for block in writer.missing():
        start, stop = writer.bounds(block)
        writer.write(block, {"image": IMAGES[start:stop], "label": LABELS[start:stop]})
    facts = {"resolution": 8, "class_names": ("a", "b", "c"), "conditions": {}}
    return out.commit(SampleManifest, writer.finish(), counts={"images": 3}, **facts).uri


def test_the_file_is_named_and_never_replaced(samples: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out" / "samples.npz"
    assert main(["npz", samples, str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    with np.load(path) as arrays:
        assert np.array_equal(arrays["arr_0"], IMAGES)
        assert np.array_equal(arrays["arr_1"], LABELS)
    assert main(["npz", samples, str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: exists already; name another file\n"


def test_a_folder_without_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["npz", str(tmp_path), str(tmp_path / "a.npz")]) == 2
    assert "no finished output" in capsys.readouterr().err
