"""Samples from anywhere against a reference from anywhere."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from judging import Coarse, fd, pixels
from PIL import Image

from dit import compare as module
from dit.compare import ImageComparison
from dit.evaluate import EvaluateConfig
from dit.export import CheckpointManifest
from dit.metrics.extractors.base import FeatureExtractor
from dit.metrics.precision_recall import precision_recall
from dit.sample import SampleManifest
from storage.errors import InputError
from storage.latents import LatentManifest
from storage.rows.store import RowReader
from storage.shards.shard import ShardManifest


@pytest.fixture
def ran(judge: EvaluateConfig, tmp_path: Path) -> "Runner":
    return Runner(judge, tmp_path / "kept")


class Runner:
    def __init__(self, config: EvaluateConfig, root: Path) -> None:
        self._config, self._root = config, root

    def __call__(self, samples: object, reference: object) -> ImageComparison:
        where = {"root": str(self._root), "tracker": tiny.Recorder()}
        return module.compare_images(str(samples), str(reference), self._config, **where)  # type: ignore[arg-type]


def save_folder(folder: Path, images: np.ndarray) -> Path:
    for index, image in enumerate(images):
        path = folder / f"part{index // 6}" / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (folder / "notes.txt").write_text("not an image, and not looked at")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "0000.png").write_text("nor is this")
    (folder / "._0000.png").write_text("nor this")
    return folder


def save_npz(path: Path, images: np.ndarray) -> Path:
    np.savez(path, images)
    return path


def test_store_folder_and_npz_are_the_same_samples(
    ran: Runner, samples: SampleManifest, shards: ShardManifest, pictures: Path, judge: EvaluateConfig, tmp_path: Path
) -> None:
    images = RowReader(samples).array("image")
    folder, npz = save_folder(tmp_path / "folder", images), save_npz(tmp_path / "a.npz", images)
    store, files, array = (ran(source, shards.url) for source in (samples.url, folder, npz))
    assert store.metrics["fd"] == pytest.approx(fd(judge, images, pixels(pictures, "train")[0]), rel=1e-3)
    assert array.metrics == store.metrics
    assert files.metrics == pytest.approx(store.metrics)
    assert store.counts == {"samples": 11, "reference": tiny.COUNT, "reference_kept": tiny.COUNT}
    assert ran(Path(samples.uri), shards.uri).metrics == store.metrics


def test_conditions_are_complete(ran: Runner, samples: SampleManifest, shards: ShardManifest, tmp_path: Path) -> None:
    store = ran(samples.url, shards.url)
    assert store.conditions.items() >= samples.conditions.items()
    expected = {"samples": samples.digest, "resolution": tiny.SIDE, "reference_count": tiny.COUNT}
    assert store.conditions.items() >= expected.items()
    assert store.conditions["reference_crop"] == "box-bicubic-centre-32"
    npz = ran(save_npz(tmp_path / "a.npz", RowReader(samples).array("image")), samples.url)
    assert npz.conditions["count"] == 11
    assert npz.conditions["reference"] == samples.digest
    assert npz.conditions["reference_crop"] == "none-32"
    assert {"extractor_sha256", "interval", "metrics_dtype"} <= set(npz.conditions)
    assert npz.distance.startswith("FD[demo-digits@")


def test_references_of_all_kinds(
    ran: Runner, samples: SampleManifest, latents: LatentManifest, shards: ShardManifest, pictures: Path, tmp_path: Path
) -> None:
    of_shards = ran(samples.url, shards.url)
    assert ran(samples.url, latents.url).metrics == of_shards.metrics
    cropped = ran(samples.url, pictures / "train")  # wider than high, so cropped as for training
    assert cropped.metrics == pytest.approx(of_shards.metrics, rel=1e-3, abs=1e-6)
    array = ran(samples.url, save_npz(tmp_path / "reference.npz", pixels(pictures, "train")[0]))
    assert array.metrics == pytest.approx(of_shards.metrics, rel=1e-3, abs=1e-6)
    itself = ran(samples.url, samples.url).metrics
    assert itself["fd"] == pytest.approx(0, abs=1e-3)
    assert itself["precision_fp32"] == itself["recall_fp32"] == 1


def use(monkeypatch: pytest.MonkeyPatch, extractor: FeatureExtractor) -> FeatureExtractor:
    monkeypatch.setattr(module, "load_extractor", lambda *_: extractor)
    return extractor


def statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """What ADM's reference files hold, by NumPy."""
    found = Coarse(published=True).outputs(images)
    assert found.spatial is not None
    layers = {"": found.features.double().numpy(), "_s": found.spatial.double().numpy()}
    means = {f"mu{suffix}": x.mean(0) for suffix, x in layers.items()}
    return means | {f"sigma{suffix}": np.cov(x.T) for suffix, x in layers.items()}


def test_statistics_of_the_file_stand_for_the_reference(
    ran: Runner, samples: SampleManifest, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = use(monkeypatch, Coarse(published=True))
    images, few = pixels(pictures, "train")[0], pixels(pictures, "held_out")[0]
    measured = ran(samples.url, save_npz(tmp_path / "images.npz", images)).metrics
    np.savez(tmp_path / "statistics.npz", **statistics(images))
    alone = ran(samples.url, tmp_path / "statistics.npz")
    for name in ("fid", "fid_low", "fid_high", "fid_infinity", "sfid", "inception_score"):
        assert alone.metrics[name] == pytest.approx(measured[name], rel=1e-4), name
    assert not {"kid", "precision_fp32", "recall_adm_fp16"} & set(alone.metrics)  # these need single features
    assert alone.conditions["reference_statistics"] == "as in the file"
    assert alone.counts["reference"] == 0
    np.savez(tmp_path / "both.npz", arr_0=few, **statistics(images))  # as published: more in mu than in arr_0
    both = ran(samples.url, tmp_path / "both.npz").metrics
    assert both["fid"] == alone.metrics["fid"]
    found = extractor(RowReader(samples).array("image"))
    assert (both["precision_fp32"], both["recall_fp32"]) == precision_recall(extractor(few), found, "fp32")


def test_statistics_of_another_network_are_not_compared(
    ran: Runner, samples: SampleManifest, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pixels(pictures, "train")[0]
    np.savez(tmp_path / "statistics.npz", **statistics(images))
    with pytest.raises(InputError, match="only statistics of the published Inception.*; use a reference with images"):
        ran(samples.url, tmp_path / "statistics.npz")
    np.savez(tmp_path / "both.npz", arr_0=images, **statistics(images))
    with_images = ran(samples.url, tmp_path / "both.npz").metrics  # its images are measured instead
    assert with_images == ran(samples.url, save_npz(tmp_path / "images.npz", images)).metrics
    use(monkeypatch, Coarse(published=True))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(13), sigma=np.eye(13))
    with pytest.raises(InputError, match="the features have different dimensions, 13 and 12"):
        ran(samples.url, tmp_path / "wide.npz")


def test_other_sizes_are_not_compared(ran: Runner, samples: SampleManifest, tmp_path: Path) -> None:
    small = save_npz(tmp_path / "small.npz", np.zeros((5, 16, 16, 3), np.uint8))
    line = "small.npz: the images have 16 px, the samples 32 px; compare images of one size"
    with pytest.raises(InputError, match=line):
        ran(samples.url, small)
    with pytest.raises(InputError, match="the images have 32 px, the samples 16 px"):
        ran(small, samples.url)


def test_a_folder_of_samples_must_be_squares_of_one_size(ran: Runner, shards: ShardManifest, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "folder", np.zeros((7, 16, 16, 3), np.uint8))
    Image.new("RGB", (16, 15)).save(folder / "part1" / "0009.png")
    with pytest.raises(InputError, match="part1/0009.png: 16x15 pixels; all samples must be squares of one size"):
        ran(folder, shards.url)
    (folder / "part1" / "0009.png").write_bytes(b"words")
    with pytest.raises(InputError, match="part1/0009.png: not an image; repair or remove it"):
        ran(folder, shards.url)


def test_what_holds_no_images(
    ran: Runner, samples: SampleManifest, checkpoint: CheckpointManifest, shards: ShardManifest, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"{source}: neither a folder of images nor the output of a stage"):
            ran(source, shards.url)
    with pytest.raises(InputError, match="is the output of 'train', which has no images to compare with"):
        ran(samples.url, checkpoint.url)
    with pytest.raises(InputError, match="an output of 'train'; one of 'sample' is needed"):
        ran(checkpoint.url, shards.url)


def test_linked_class_folders_are_part_of_a_reference(
    ran: Runner, samples: SampleManifest, pictures: Path, tmp_path: Path
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for folder in (pictures / "train").iterdir():
        (linked / folder.name).symlink_to(folder)
    theirs, ours = ran(samples.url, pictures / "train"), ran(samples.url, linked)
    assert ours.metrics == theirs.metrics
    assert ours.counts == theirs.counts


def test_reference_statistics_are_kept(ran: Runner, samples: SampleManifest, pictures: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(pictures / "train", reference)
    first = ran(samples.url, reference)
    (kept,) = (tmp_path / "kept" / "references").iterdir()
    before = kept.stat().st_mtime_ns
    assert ran(samples.url, reference).metrics == first.metrics
    assert kept.stat().st_mtime_ns == before
    Image.new("RGB", (40, 40)).save(next(reference.rglob("*.png")))  # another image, so another reference
    assert ran(samples.url, reference).metrics != first.metrics
    assert len(list((tmp_path / "kept" / "references").iterdir())) == 2
