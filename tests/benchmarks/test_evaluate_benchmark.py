"""The benchmark of the metrics, in small."""

import pytest

from benchmarks import evaluate
from benchmarks.evaluate import distances, layouts, memory


def test_distances_agree_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    results, ratios = distances(20)
    values = {result.name: result.value for result in results}
    assert ratios["fd_vs_sqrtm"] == pytest.approx(values["fd_sqrtm"] / values["fd"])
    assert ratios["fd_vs_eigvals"] == pytest.approx(values["fd_eigvals"] / values["fd"])
    monkeypatch.setattr(evaluate, "frechet_distance", lambda *_: 1.0)
    with pytest.raises(ValueError, match="disagree"):
        distances(20)


def test_layouts_and_memory() -> None:
    results, ratios = layouts(1)
    values = {result.name: result.value for result in results}
    assert ratios["features_vs_plain"] == pytest.approx(values["features"] / values["features_plain"])
    (took, peak), _ = memory(10, 20, 4)
    assert took.value > 0
    assert 0.05 < peak.value < 5
