"""CIFAR-10 as it lies, judged by a classifier that others trained."""

from pathlib import Path

import pytest

from benchmarks.replication import classifier
from dit.evaluate import MetricsManifest
from flows.contract import STAGES, Source
from flows.recipe import load_recipe
from storage.tracker import NullTracker


@pytest.mark.data
def test_a_model_of_photographs_is_trained_and_judged(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = tmp_path / "resnet56.onnx"
    monkeypatch.setattr("sys.argv", ["classifier", str(cifar10), str(judge)])
    classifier.main()
    recipe = load_recipe(
        "cifar10-pixel-small",
        [
            *(f"archive.{split}={cifar10}/test.zip" for split in ("train", "held_out")),
            f"evaluate.extractor.weights={judge}",
            *("train.steps=2", "train.batch_size=8", "sample.count=20", "sample.steps=2"),
        ],
    )
    source: Source = recipe.archive
    for name in ("shard", "encode", "train", "sample", "evaluate"):
        stage, config = STAGES[name], recipe.config_of(name)
        source = stage.run(config, source, out=stage.output(str(tmp_path), config, source), tracker=NullTracker())
    assert isinstance(source, MetricsManifest)
    assert source.distance.startswith("FD[resnet56@")
    assert source.counts["samples"] == 20
    assert source.metrics["fd_floor"] < source.metrics["fd"] / 2
    assert 0 <= source.metrics["recognised"] < 0.6
