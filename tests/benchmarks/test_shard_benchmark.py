"""The benchmark of sharding, in small."""

import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.imagenet_like import file_bytes, file_name, write_archive
from benchmarks.shard import WRITERS, against_peers, growth

IMAGES, CLASSES, SIZE = 30, 4, (32, 24)


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as packed:
        for number in range(IMAGES):
            packed.writestr(file_name(number, CLASSES), file_bytes(number, SIZE))


@pytest.mark.parametrize("name", ["images.tar", "images.zip"])
def test_all_write_the_same_images(tmp_path: Path, name: str) -> None:
    archive = tmp_path / name
    write_zip(archive) if name.endswith(".zip") else write_archive(archive, IMAGES, CLASSES, SIZE)
    results, ratios = against_peers(tmp_path, archive, repeats=1)
    values = {result.name: result.value for result in results}
    assert ratios["shard_vs_webdataset"] == pytest.approx(values["shard"] / values["webdataset"])
    assert ratios["shard_cpu_vs_tarfile"] == pytest.approx(values["tarfile_cpu"] / values["shard_cpu"])
    found = {}
    for writer in WRITERS:
        with tarfile.open(next((tmp_path / f"{writer}-0").rglob("*.tar"))) as tar:
            found[writer] = sorted(tar.extractfile(info).read() for info in tar)  # type: ignore[union-attr]
    assert found["shard"] == found["tarfile"] == found["tarfile_synced"] == found["webdataset"]
    assert {file_bytes(number, SIZE) for number in range(IMAGES)} <= set(found["shard"])


def test_growth(tmp_path: Path) -> None:
    results, ratios = growth(tmp_path, (20, 40), (32, 24), classes=4)
    values = {result.name: result.value for result in results}
    assert ratios == {"growth_40_vs_20": pytest.approx(values["shard_20"] / values["shard_40"])}
    assert 20 < values["peak_rss_mib_20"] < 1000
