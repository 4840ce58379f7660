"""The benchmark of sharding, in small."""

import tarfile
from pathlib import Path

import pytest

from benchmarks import shard
from benchmarks.imagenet_like import file_bytes
from benchmarks.shard import against_tarfile, growth


def test_against_tarfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "REPEATS", 1)
    results, ratios = against_tarfile(tmp_path, images=30, size=(32, 24), classes=4)
    values = {result.name: result.value for result in results}
    assert ratios == {"shard_vs_tarfile": pytest.approx(values["shard"] / values["tarfile"])}
    peer, ours = (next(tmp_path.glob(f"{name}-0/**/*.tar")) for name in ("peer", "ours"))
    found = [sorted(tar.extractfile(info).read() for info in tar) for tar in map(tarfile.open, (peer, ours))]  # type: ignore[union-attr]
    assert found[0] == found[1]
    assert {file_bytes(number, (32, 24)) for number in range(30)} <= set(found[0])


def test_growth(tmp_path: Path) -> None:
    results, ratios = growth(tmp_path, (20, 40), (32, 24), classes=4)
    values = {result.name: result.value for result in results}
    assert ratios == {"growth_40_vs_20": pytest.approx(values["shard_20"] / values["shard_40"])}
    assert 20 < values["peak_rss_mib_20"] < 1000
