import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from forked import Job, Template
from judging import LEFT, Coarse, as_samples, fd, pixels
from PIL import Image

from dit import evaluate
from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.export import CheckpointManifest
from dit.metrics import summary
from dit.metrics.extractors.demo_digits import load_digits_classifier
from dit.metrics.frechet import Statistics
from dit.metrics.inception_score import InceptionScore
from dit.metrics.kernel import kernel_distance
from dit.metrics.measure import RANGE
from dit.metrics.precision_recall import precision_recall
from dit.metrics.resample import fd_infinity, fd_standard_error
from dit.sample import SampleManifest
from storage import uri
from storage.archives.known import input_digests
from storage.archives.open import ArchiveRef
from storage.errors import InputError, StorageError
from storage.images import transforms
from storage.latents import LatentManifest
from storage.manifest import stage_output
from storage.rows.store import RowReader
from storage.shards import shard as shard
from storage.shards.shard import ShardConfig, ShardManifest
from storage.tracker import NullTracker


def test_training_images_are_at_no_distance_from_themselves(
    tmp_path: Path, pictures: Path, checkpoint: CheckpointManifest, judge: EvaluateConfig
) -> None:
    images, labels = pixels(pictures, "train")
    metrics = tiny.run_evaluate(tmp_path, judge, as_samples(tmp_path, checkpoint, images, labels)).metrics
    assert metrics["fd"] == pytest.approx(0, abs=1e-4 * metrics["fd_floor"])
    assert 0 < metrics["fd_floor"] < metrics["fd_ceiling"] / 2
    assert metrics["fd_at_floor_n"] > metrics["fd"]


def test_held_out_images_are_at_the_floor(
    tmp_path: Path, pictures: Path, checkpoint: CheckpointManifest, judge: EvaluateConfig
) -> None:
    images, labels = pixels(pictures, "held_out")
    metrics = tiny.run_evaluate(tmp_path, judge, as_samples(tmp_path, checkpoint, images, labels)).metrics
    assert metrics["fd"] == pytest.approx(metrics["fd_floor"], rel=1e-6)
    assert metrics["fd_at_floor_n"] == metrics["fd"]
    assert metrics["fd"] == pytest.approx(fd(judge, images, pixels(pictures, "train")[0]), rel=1e-3)


def test_noise_is_at_the_ceiling(
    tmp_path: Path, pictures: Path, checkpoint: CheckpointManifest, judge: EvaluateConfig
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, tiny.SIDE, tiny.SIDE, 3), np.uint8)
    manifest = as_samples(tmp_path, checkpoint, noise, np.zeros(200, np.int32))
    metrics = tiny.run_evaluate(tmp_path, judge, manifest).metrics
    assert metrics["fd"] == pytest.approx(metrics["fd_ceiling"], rel=0.05)
    assert metrics["fd"] != metrics["fd_ceiling"]
    assert metrics["fd"] == pytest.approx(fd(judge, noise, pixels(pictures, "train")[0]), rel=1e-3)


def test_numbers_of_a_models_samples(
    tmp_path: Path, pictures: Path, samples: SampleManifest, shards: ShardManifest, judge: EvaluateConfig
) -> None:
    recorder = tiny.Recorder()
    manifest = tiny.run_evaluate(tmp_path, judge, samples, recorder)
    images = RowReader(samples).array("image")
    training = pixels(pictures, "train")[0]
    assert manifest.metrics["fd"] == pytest.approx(fd(judge, images, training), rel=1e-3)
    assert manifest.metrics["fd"] > manifest.metrics["fd_floor"]
    assert manifest.counts == {"samples": 11, "reference": tiny.COUNT, "reference_kept": tiny.COUNT, "floor": 11}
    assert recorder.values == {0: manifest.metrics}
    assert recorder.steps[-1][0] == recorder.steps[-1][1] == tiny.COUNT + 3 * 11
    digest = uri.sha256(Path(judge.extractor.weights, "model.safetensors").read_bytes())
    assert manifest.distance == f"FD[demo-digits@{digest[:8]}]"
    assert manifest.conditions == samples.conditions | {
        "extractor": "demo-digits",
        "extractor_version": 1,
        "extractor_sha256": digest,
        "extractor_preprocessing": "bicubic-32px/127.5-1",
        "reference": shards.digest,
        "reference_split": "train",
        "reference_crop": "box-bicubic-centre-32",
        "noise_seed": 0,
        "precision_recall_modes": "fp32",
        "metrics_seed": 0,
        "metrics_dtype": "float32 features without TF32, float64 statistics",
        "score_split": 5000,
        "precision_recall_neighbour": 3,
        "kernel": "(x y / D + 1)^3, unbiased, all pairs",
        "infinity_sizes": 15,
        "interval": "95 %, normal, from 32 bootstrap resamples of the samples",
    }


def test_published_inception_gives_the_names_of_the_papers(
    tmp_path: Path,
    pictures: Path,
    checkpoint: CheckpointManifest,
    judge: EvaluateConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every number is what its function gives for all features at once."""
    monkeypatch.setattr(evaluate, "load_extractor", lambda *_: Coarse(published=True))
    training, (images, labels) = pixels(pictures, "train")[0], pixels(pictures, "held_out")
    manifest = tiny.run_evaluate(tmp_path, judge, as_samples(tmp_path, checkpoint, images, labels))
    near, found = Coarse(published=True).outputs(training), Coarse(published=True).outputs(images)
    reference, samples = Statistics.of(near.features), Statistics.of(found.features)
    margin = 1.96 * fd_standard_error(reference, found.features, 0)
    score = InceptionScore()
    score.update(found.logits)
    fid, floor = reference.distance(samples), manifest.metrics["fid_floor"]
    expected = {
        "fid": fid,
        "fid_low": fid - margin,
        "fid_high": fid + margin,
        "fid_infinity": fd_infinity(reference, found.features, 0),
        "fid_floor": floor,
        "fid_at_floor_n": fid,
        "fid_ceiling": manifest.metrics["fid_ceiling"],
        "sfid": Statistics.of(near.spatial).distance(Statistics.of(found.spatial)),
        "kid": kernel_distance(near.features, found.features),
        "inception_score": score.value(),
    }
    for mode in ("adm-fp16", "fp32"):
        both = precision_recall(near.features, found.features, mode)
        expected |= {
            f"{name}_{mode}".replace("-", "_"): v for name, v in zip(("precision", "recall"), both, strict=True)
        }
    assert manifest.metrics == pytest.approx(expected, rel=1e-4)
    assert fid == pytest.approx(floor, rel=1e-6)
    assert manifest.distance == "FID[inception-tf@6726825d]"
    assert manifest.conditions["precision_recall_modes"] == "adm-fp16, fp32"


def test_other_weights_of_inception_give_no_fid(
    tmp_path: Path, samples: SampleManifest, judge: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_extractor", lambda *_: Coarse(published=False))
    manifest = tiny.run_evaluate(tmp_path, judge, samples)
    assert {"fd", "sfd", "kd", "classifier_score", "precision_adm_fp16"} < set(manifest.metrics)
    assert not {"fid", "sfid", "kid", "inception_score"} & set(manifest.metrics)
    assert manifest.distance == "FD[inception-tf@6726825d]"


def test_single_features_are_those_of_the_first_reference_images_and_all_samples(
    tmp_path: Path,
    shards: ShardManifest,
    samples: SampleManifest,
    judge: EvaluateConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Tensor] = []

    def spy(reference: torch.Tensor, found: torch.Tensor, mode: str) -> tuple[float, float]:
        seen.extend((reference, found))
        return 0.0, 0.0

    monkeypatch.setattr(evaluate, "KEPT_REFERENCE", 20)
    monkeypatch.setattr(summary, "precision_recall", spy)
    manifest = tiny.run_evaluate(tmp_path, judge, samples)
    assert manifest.counts["reference_kept"] == 20
    extractor = load_digits_classifier(judge.extractor.weights)
    first = [transforms.load(item.data, tiny.SIDE) for item in shard.read_images(shards, "train", 0, 20)]
    torch.testing.assert_close(seen[0].cpu(), extractor(np.stack(first)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen[1].cpu(), extractor(RowReader(samples).array("image")), rtol=1e-4, atol=1e-6)


def test_batches_do_not_matter(tmp_path: Path, samples: SampleManifest, judge: EvaluateConfig) -> None:
    runs = [
        tiny.run_evaluate(tmp_path / str(size), judge.model_copy(update={"batch_size": size}), samples)
        for size in (3, 64)
    ]
    assert runs[0].digest == runs[1].digest
    assert runs[0].metrics == pytest.approx(runs[1].metrics, rel=1e-4)


def test_any_number_of_ranks_gives_the_same_bits(
    tmp_path: Path, checkpoint: CheckpointManifest, judge: EvaluateConfig, template: Template
) -> None:
    """Samples and noise are two stretches, the rest is one; a kept reference is named by its bytes."""
    count = RANGE + 100
    drawn = np.random.default_rng(1).integers(0, 256, (count, tiny.SIDE, tiny.SIDE, 3), np.uint8)
    samples = as_samples(tmp_path, checkpoint, drawn, np.arange(count, dtype=np.int32) % 3)
    alone, together = tmp_path / "alone", tmp_path / "together"
    expected = tiny.run_evaluate(alone, judge, samples)
    out = tiny.output(together, MetricsManifest, judge, samples=samples)
    told = template.finish(Job(out, judge, samples)).progress
    total = tiny.COUNT + 2 * count + 18
    assert [line for line in told if line[0] == 0][-1] == [0, total, total]
    assert MetricsManifest.read(out.uri).metrics == expected.metrics
    kept = [{path.name for path in root.glob("references/*/*.safetensors")} for root in (alone, together)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 2


def test_floor_is_taken_from_as_many_images_as_there_are_samples(
    tmp_path: Path, pictures: Path, checkpoint: CheckpointManifest, shards: ShardManifest, judge: EvaluateConfig
) -> None:
    images, labels = pixels(pictures, "train")
    manifest = tiny.run_evaluate(tmp_path, judge, as_samples(tmp_path, checkpoint, images[:7], labels[:7]))
    assert manifest.counts["floor"] == 7
    assert manifest.metrics["fd_at_floor_n"] == manifest.metrics["fd"]
    names = [item.name for item in shard.read_images(shards, "held_out", 0, 7)]
    held_out = [np.asarray(Image.open(pictures / "held_out" / name))[:, LEFT : LEFT + tiny.SIDE] for name in names]
    assert manifest.metrics["fd_floor"] == pytest.approx(fd(judge, np.stack(held_out), images), rel=1e-3)


def test_recognised_is_the_share_of_the_class_that_is_seen(
    tmp_path: Path, pictures: Path, checkpoint: CheckpointManifest, judge: EvaluateConfig
) -> None:
    images, labels = pixels(pictures, "train")
    labels[:] = 0
    labels[: len(labels) // 3] = tiny.CLASSES.index("5")
    metrics = tiny.run_evaluate(tmp_path, judge, as_samples(tmp_path, checkpoint, images, labels)).metrics
    assert metrics["recognised"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("label", "class_names"), [(-1, tiny.CLASSES), (0, ("cat", "5", "dog"))], ids=["no label", "other classes"]
)
def test_what_a_classifier_cannot_know_is_not_asked(
    tmp_path: Path,
    pictures: Path,
    checkpoint: CheckpointManifest,
    judge: EvaluateConfig,
    label: int,
    class_names: tuple[str, ...],
) -> None:
    images, labels = pixels(pictures, "held_out")
    labels[:] = label
    manifest = as_samples(tmp_path, checkpoint, images, labels, class_names)
    assert "recognised" not in tiny.run_evaluate(tmp_path, judge, manifest).metrics


def pipeline(root: Path, pictures: Path, vae: object, *, held_out: bool) -> SampleManifest:
    """Every stage up to the samples, in a root of its own."""
    config = ShardConfig(images_per_shard=10)
    archive = ArchiveRef(train=str(pictures / "train"), held_out=str(pictures / "held_out") if held_out else None)
    out = stage_output(str(root), shard.STAGE, 1, config, parents={}, inputs=input_digests(archive))
    shards = shard.run(config, archive, out=out, tracker=NullTracker())
    latents = tiny.run_encode(root, tiny.encode_config(vae, flips=False), shards)
    training = tiny.TRAINING.model_copy(update={"steps": 2, "flips": False})
    return tiny.run_sample(root, tiny.SAMPLING, tiny.run_train(root, training, latents))


def test_a_root_may_move(tmp_path: Path, pictures: Path, vae: object, judge: EvaluateConfig) -> None:
    before = pipeline(tmp_path / "before", pictures, vae, held_out=True)
    expected = tiny.run_evaluate(tmp_path / "elsewhere", judge, before)
    (tmp_path / "before").rename(tmp_path / "after")
    moved = SampleManifest.read(before.uri.replace("before", "after"))
    found = tiny.run_evaluate(tmp_path / "after", judge, moved)
    assert found.metrics == expected.metrics
    assert found.digest == expected.digest
    lineage = found.parent("samples", SampleManifest).parent("checkpoint", CheckpointManifest)
    shards = lineage.parent("latents", LatentManifest).parent("shards", ShardManifest)
    assert str(tmp_path / "after") in shards.uri
    assert found.conditions["reference"] == shards.digest


@pytest.mark.parametrize("lost", ["train", "encode", "shard"])
def test_a_lost_parent_is_named(tmp_path: Path, pictures: Path, vae: object, judge: EvaluateConfig, lost: str) -> None:
    samples = pipeline(tmp_path, pictures, vae, held_out=False)
    shutil.rmtree(tmp_path / lost)
    with pytest.raises(InputError, match=f"{tmp_path}/{lost}/.*no finished output"):
        tiny.run_evaluate(tmp_path, judge, samples)


def test_without_held_out_images_there_is_no_floor(
    tmp_path: Path, pictures: Path, vae: object, judge: EvaluateConfig
) -> None:
    manifest = tiny.run_evaluate(tmp_path, judge, pipeline(tmp_path, pictures, vae, held_out=False))
    others = {"fd_low", "fd_high", "fd_infinity", "kd", "precision_fp32", "recall_fp32", "classifier_score"}
    assert set(manifest.metrics) == {"fd", "fd_ceiling", "recognised"} | others
    assert manifest.counts["floor"] == 0


def test_samples_that_were_damaged_are_not_measured(
    tmp_path: Path, pictures: Path, checkpoint: CheckpointManifest, judge: EvaluateConfig
) -> None:
    images, labels = pixels(pictures, "held_out")
    manifest = as_samples(tmp_path, checkpoint, images, labels)
    path = Path(manifest.uri, "data/image/c/0/0/0/0")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match="data/image/c/0/0/0/0"):
        tiny.run_evaluate(tmp_path, judge, manifest)
    assert not list(tmp_path.glob(f"{MetricsManifest.STAGE}/*/manifest.json"))


@pytest.mark.parametrize("count", [1, 3])
def test_a_few_samples_are_too_few(
    tmp_path: Path, checkpoint: CheckpointManifest, judge: EvaluateConfig, count: int
) -> None:
    few = as_samples(tmp_path, checkpoint, np.zeros((count, 32, 32, 3), np.uint8), np.zeros(count, np.int32))
    with pytest.raises(InputError, match=f"need at least 4 reference images and samples, not .* and {count};"):
        tiny.run_evaluate(tmp_path, judge, few)
