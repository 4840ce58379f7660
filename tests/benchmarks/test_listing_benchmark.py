"""The benchmark of listing a root, in small."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import listing


def test_contest_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, ratios = listing.contest(tmp_path / "root", 10)
    values = {result.name: result.value for result in results}
    assert values.keys() == {"loop", "read", "ls"}
    assert ratios["read_vs_loop"] == pytest.approx(values["read"] / values["loop"])
    nothing = subprocess.CompletedProcess([], 0, stdout=b"")
    monkeypatch.setattr(listing.subprocess, "run", lambda *_, **__: nothing)
    with pytest.raises(ValueError, match="ls lists -1 of 10 outputs"):
        listing.contest(tmp_path / "root", 10)
