"""The rehearsal of ImageNet's size, in small: its archive, its watch over processes, and its table."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.scale.data import EVERY, SIDE, TRUNCATED, Pictures, write, write_autoencoder
from benchmarks.scale.table import Line, growth, table
from benchmarks.scale.watch import watch
from dit.vae import VaeRef, load_vae
from storage.archives.open import ArchiveRef, open_splits
from storage.images.transforms import UnreadableImage, inspect

IMAGES, HELD_OUT, CLASSES = 2100, 7, 3


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> ArchiveRef:
    folder = tmp_path_factory.mktemp("scale")
    return ArchiveRef(**write(folder, IMAGES, HELD_OUT, Pictures(None), CLASSES))


def test_the_archive_is_one_of_imagenets_form_with_odd_files(ref: ArchiveRef) -> None:
    splits = open_splits(ref)
    assert {name: len(split.members) for name, split in splits.items()} == {"train": IMAGES, "held_out": HELD_OUT}
    assert [member.label for member in splits["train"].members] == sorted(k % CLASSES for k in range(IMAGES))
    labels = {member.name.rpartition("_")[2]: member.label for member in splits["held_out"].members}
    assert labels == {f"{k + 1:08d}.JPEG": k % CLASSES for k in range(HELD_OUT)}
    files = [splits["train"].read(member) for member in splits["train"].members]
    images = [Image.open(io.BytesIO(data)) for data in files if _readable(data)]
    assert IMAGES - len(images) == len(range(2, IMAGES, TRUNCATED))
    assert sum(image.format == "PNG" for image in images) >= IMAGES // EVERY["PNG"]
    assert sum(image.mode == "CMYK" for image in images) >= IMAGES // EVERY["CMYK"]
    assert {image.size for image in images} == {(SIDE, SIDE)}
    assert len(set(files)) > 0.98 * IMAGES


def _readable(data: bytes) -> bool:
    try:
        inspect(data)
    except UnreadableImage:
        return False
    return True


def test_an_archive_that_is_there_is_kept(ref: ArchiveRef) -> None:
    train = Path(ref.train)
    before = train.stat().st_mtime_ns
    write(train.parent, IMAGES, HELD_OUT, Pictures(None), CLASSES)
    assert train.stat().st_mtime_ns == before


def test_the_autoencoder_is_one_that_encode_reads(tmp_path: Path) -> None:
    write_autoencoder(tmp_path)
    vae = load_vae(VaeRef(source=str(tmp_path)))
    assert (vae.channels, SIDE // vae.downsample) == (4, 8)


def test_a_command_is_watched_with_its_children() -> None:
    child = "import time; data = bytearray(300 << 20); time.sleep(2)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('done')"
    seen = watch([sys.executable, "-c", parent], lambda: "working")
    assert seen.output == "done\n"
    assert seen.peaks["working"]["other"] > 300 << 20 > seen.peaks["working"]["command"] > 0
    assert 0 < seen.processor["working"] < seen.seconds
    with pytest.raises(subprocess.CalledProcessError):
        watch([sys.executable, "-c", "raise SystemExit(3)"], lambda: "")


def test_growth_is_time_for_an_image_relative_to_the_fewest() -> None:
    names = ("shard", "encode", "evaluate", "plan", "run")
    found = {
        count: [Line(name, count, seconds, 2 * seconds, {"rank": 2**30}) for name in names]
        for count, seconds in ((100, 1.0), (1000, 12.0))
    }
    ratios = growth(found)
    assert ratios == {f"{name}_growth{kind}": pytest.approx(1.2) for name in names for kind in ("", "_processor")}
    assert growth({100: found[100]}) == {}
    lines = table([*found[100], Line("read all manifests", 100, 0.5, 0.0, {})]).splitlines()
    assert "1,024" in lines[1]
    assert lines[-1] == "run: rank 1,024"
