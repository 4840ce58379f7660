"""Reference statistics are taken once, and again when they are damaged."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from dit import evaluate
from dit.evaluate import EvaluateConfig
from dit.metrics import reference
from dit.metrics.extractors.base import Outputs
from dit.metrics.extractors.demo_digits import DemoDigits, load_digits_classifier
from dit.metrics.summary import Summary
from dit.sample import SampleManifest
from storage.errors import StorageError
from storage.manifest import Manifest, stage_output
from storage.seal import opened, sealed
from storage.shards.shard import ShardManifest


class Counting:
    """An extractor that counts the images it sees."""

    def __init__(self, extractor: DemoDigits) -> None:
        self._extractor, self.seen = extractor, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._extractor, name)

    def outputs(self, images: torch.Tensor) -> Outputs:
        self.seen += len(images)
        return self._extractor.outputs(images)


@pytest.fixture
def counting(judge: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    counted = Counting(load_digits_classifier(judge.extractor.weights))
    monkeypatch.setattr(evaluate, "load_extractor", lambda *_: counted)
    yield counted


def metrics_of(root: Path, config: EvaluateConfig, samples: SampleManifest) -> dict[str, float]:
    """A fresh evaluation: the manifest of the last one is out of the way."""
    for path in root.glob("evaluate/*/manifest.json"):
        path.unlink()
    return tiny.run_evaluate(root, config, samples).metrics


def test_the_next_evaluation_reads_what_the_first_took(
    tmp_path: Path, samples: SampleManifest, judge: EvaluateConfig, counting: Counting
) -> None:
    first = metrics_of(tmp_path, judge, samples)
    drawn, noise, training, held_out = 11, 11, tiny.COUNT, 11
    assert counting.seen == drawn + noise + training + held_out
    recorder = tiny.Recorder()
    for path in tmp_path.glob("evaluate/*/manifest.json"):
        path.unlink()
    second = tiny.run_evaluate(tmp_path, judge, samples, recorder).metrics
    assert counting.seen == 2 * (drawn + noise) + training + held_out
    assert second == first
    assert recorder.steps[-1][0] == recorder.steps[-1][1]  # what is read counts as done
    assert len(list((tmp_path / "references").iterdir())) == 2


def test_what_is_kept_says_what_it_is(
    tmp_path: Path, samples: SampleManifest, shards: ShardManifest, judge: EvaluateConfig
) -> None:
    metrics_of(tmp_path, judge, samples)
    kept = [Manifest.read(str(path)) for path in (tmp_path / "references").iterdir()]
    training = next(manifest for manifest in kept if manifest.counts["images"] == tiny.COUNT)
    assert training.config == {
        "crop": "box-bicubic-centre",
        "resolution": tiny.SIDE,
        "count": tiny.COUNT,
        "kept": tiny.COUNT,
        "extractor": "demo-digits 1 bicubic-32px/127.5-1",
    }
    assert set(training.inputs) == {"images", "extractor"}
    (entry,) = training.files
    tensors = load_file(Path(training.uri, entry.path))
    features = tensors["features"].double().numpy()
    assert features.shape == (tiny.COUNT, 64)
    np.testing.assert_allclose(tensors["pooled.mean"], features.mean(0), rtol=1e-10)
    np.testing.assert_allclose(tensors["pooled.m2"] / (tiny.COUNT - 1), np.cov(features.T), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "manifest", "hollow"])
def test_what_is_damaged_is_noticed_and_taken_anew(
    tmp_path: Path,
    samples: SampleManifest,
    judge: EvaluateConfig,
    counting: Counting,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    first = metrics_of(tmp_path, judge, samples)
    for path in (tmp_path / "references").glob("*/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        if damage == "manifest":
            path.with_name("manifest.json").write_text("{}")
        elif damage == "gone":
            path.unlink()
        elif damage == "hollow":
            manifest = path.with_name("manifest.json")
            text = opened(manifest.read_bytes()).replace(b'"files":', b'"files": [], "files_":')
            manifest.write_bytes(sealed(text))
        else:
            path.write_bytes(data if damage == "flipped" else data[:-1])
    before = counting.seen
    with caplog.at_level(logging.WARNING):
        assert metrics_of(tmp_path, judge, samples) == first
    assert counting.seen - before == before
    assert "damaged, measuring again" in caplog.text
    again = counting.seen
    metrics_of(tmp_path, judge, samples)
    assert counting.seen - again == 22  # the new ones are whole


def test_what_is_damaged_behind_a_symbolic_link_is_not_removed(tmp_path: Path) -> None:
    config = reference.ReferenceConfig(crop="none", resolution=8, count=1, kept=0, extractor="x")
    out = stage_output(str(tmp_path / "root"), "references", 1, config, parents={}, inputs={})
    theirs = tmp_path / "theirs" / out.header.folder_name
    theirs.mkdir(parents=True)
    (theirs / "manifest.json").write_text("{}")
    Path(out.root).mkdir()
    Path(out.root, "references").symlink_to(theirs.parent)
    with pytest.raises(StorageError, match="references: a symbolic link to .*theirs, and nothing is removed"):
        reference._kept(out)
    assert (theirs / "manifest.json").exists()


def test_a_summary_holds_the_features_that_it_keeps_and_no_others() -> None:
    summary = Summary(2)
    for _ in range(3):
        summary.update(Outputs(torch.rand(1000, 2)), keep=1010)
    assert summary.features().shape == (1010, 2)
    assert sum(part.untyped_storage().nbytes() for part in summary._kept) == 1010 * 2 * 4
