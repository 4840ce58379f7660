"""An archive of ImageNet's form through the stage, in a process whose memory is measured."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from benchmarks.imagenet_like import class_name, file_bytes, file_name, write_archive
from storage import uri
from storage.archives.open import open_archive
from storage.shards.shard import ShardManifest, read_images
from storage.verify import faults

IMAGES, CLASSES, SIZE = 20_000, 1000, (48, 36)
PEAK_MIB = 512
"""A laptop has 8 GiB and more. Listing the full set, 1.3 million images, takes 1 GB at its height."""

SHARD = """
import sys
from benchmarks.memory import peak_mib
from storage.shards import shard
from storage.archives.known import input_digests
from storage.archives.open import ArchiveRef
from storage.manifest import stage_output
from storage.shards.runners import Local
from storage.shards.shard import ShardConfig
from storage.tracker import NullTracker

archive, root = ArchiveRef(train=sys.argv[1]), sys.argv[2]
config = ShardConfig(runner=Local(count=2))
inputs = input_digests(archive)
out = stage_output(root, shard.STAGE, shard.VERSION, config, parents={}, inputs=inputs)
made = shard.run(config, archive, out=out, tracker=NullTracker())
print(made.uri, peak_mib())
"""


@pytest.mark.full
def test_twenty_thousand_images_of_a_thousand_classes(tmp_path: Path) -> None:
    write_archive(tmp_path / "train.tar", IMAGES, CLASSES, SIZE)
    command = [sys.executable, "-c", SHARD, str(tmp_path / "train.tar"), str(tmp_path / "root")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    folder, peak = done.stdout.split()
    assert 50 < float(peak) < PEAK_MIB
    manifest = ShardManifest.read(folder)
    assert manifest.counts == {"images": IMAGES, "unreadable": 0, "classes": CLASSES, "shards": -(-IMAGES // 1024)}
    assert manifest.class_names == tuple(class_name(label) for label in range(CLASSES))
    numbers = set()
    for sample in read_images(manifest, "train"):
        number = int(sample.name.rpartition("_")[2].removesuffix(".JPEG"))
        assert (sample.name, sample.label) == (file_name(number), number % CLASSES)
        assert sample.data == file_bytes(number, SIZE)
        numbers.add(number)
    assert numbers == set(range(IMAGES))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images enough that each kind is among them."""
    path = tmp_path_factory.mktemp("few") / "few.tar"
    write_archive(path, 80, 4, SIZE)
    return path


def test_the_generated_files_are_distinct_and_of_all_kinds(few: Path) -> None:
    archive = open_archive(str(few))
    files = [archive.read(member) for member in archive.members]
    assert len({uri.sha256(data) for data in files}) == len(archive.members) == 80
    images = [Image.open(io.BytesIO(data)) for data in files]
    assert {image.mode for image in images} == {"RGB", "L", "CMYK"}
    assert {image.format for image in images} == {"JPEG", "PNG"}
    assert any(image.getexif().get(0x0112) == 6 for image in images)
    assert all(member.name.endswith(".JPEG") for member in archive.members)


def test_plain_tools_read_the_tars(few: Path, tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-c", SHARD, str(few), str(tmp_path / "root")], capture_output=True, text=True, check=True
    )
    manifest = ShardManifest.read(made.stdout.split()[0])
    path = f"{manifest.uri}/{manifest.splits['train'].shards[0].path}"
    ours = list(read_images(manifest, "train"))
    listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True).stdout.split()
    endings = ["png" if sample.data[:4] == b"\x89PNG" else "jpg" for sample in ours]
    names = [f"{sample.source_index:08d}" for sample in ours]
    pairs = zip(names, endings, strict=True)
    assert listed == [f"{name}.{part}" for name, ending in pairs for part in ("cls", ending)]
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", path, "-C", str(tmp_path / "out")], check=True)
    with tarfile.open(path) as tar:
        assert tar.getnames() == listed
    for name, ending, sample in zip(names, endings, ours, strict=True):
        assert (tmp_path / "out" / f"{name}.{ending}").read_bytes() == sample.data
    theirs = list(webdataset.WebDataset(path, shardshuffle=False).decode("pil"))
    assert [item["cls"] for item in theirs] == [sample.label for sample in ours]
    for item, ending, sample in zip(theirs, endings, ours, strict=True):
        assert item[ending] == Image.open(io.BytesIO(sample.data)).convert("RGB")


def test_two_runs_at_once_end_in_the_same_bytes(few: Path, tmp_path: Path) -> None:
    alone = [sys.executable, "-c", SHARD, str(few), str(tmp_path / "alone")]
    subprocess.run(alone, capture_output=True, check=True)
    both = [sys.executable, "-c", SHARD, str(few), str(tmp_path / "both")]
    runs = [subprocess.Popen(both, stdout=subprocess.PIPE) for _ in range(2)]
    assert [run.wait(500) for run in runs] == [0, 0]
    first, second = (
        json.loads(next(tmp_path.glob(f"{name}/shard/*/manifest.json")).read_text()) for name in ("alone", "both")
    )
    assert second["files"] == first["files"]
    assert not faults(ShardManifest.read(str(next(tmp_path.glob("both/shard/*")))), full=True)
