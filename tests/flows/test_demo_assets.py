import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dit.metrics.extractors.demo_digits import WEIGHTS as CLASSIFIER_WEIGHTS
from dit.metrics.extractors.demo_digits import DemoDigits, load_digits_classifier
from dit.vae import WEIGHTS as VAE_WEIGHTS
from dit.vae import Vae, VaeRef, load_vae
from flows.demo import CLASSIFIER, METRICS, VAE, digits, train_classifier, train_vae
from flows.demo.digits import digit_images, write_digits
from storage import uri
from storage.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits"
    write_digits(path)
    return path


@pytest.fixture(scope="module")
def vae() -> Vae:
    return load_vae(VaeRef(source=str(VAE), sha256=metrics(VAE)["sha256"]))


@pytest.fixture(scope="module")
def classifier() -> DemoDigits:
    return load_digits_classifier(str(CLASSIFIER), metrics(CLASSIFIER)["sha256"])


def metrics(folder: Path) -> dict:
    return json.loads((folder / METRICS).read_text())


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): uri.sha256(path.read_bytes()) for path in files}


def test_folder_holds_every_scan_in_its_class(folder: Path) -> None:
    scans = load_digits()
    names = set(contents(folder))
    splits = ["train"] * 1500 + ["held_out"] * 297
    counted = {"train": 0, "held_out": 0}
    for split, label in zip(splits, scans.target, strict=True):
        name = f"{split}/{label}/{counted[split]:04d}.png"
        counted[split] += 1
        names.remove(name)
    assert not names


def test_pictures_are_the_scans_enlarged(folder: Path) -> None:
    scan = load_digits().images[1500]
    path = next((folder / "held_out").glob("*/0000.png"))
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
        pixels = np.asarray(image).astype(float)
    assert np.ptp(pixels, axis=2).max() == 0
    shrunk = pixels[:, :, 0].reshape(8, 4, 8, 4).mean((1, 3))
    assert np.corrcoef(shrunk.ravel(), scan.ravel())[0, 1] > 0.97


def test_pixels_are_the_same_on_every_machine() -> None:
    found = {split: uri.sha256(digit_images(split)[0].tobytes())[:16] for split in ("train", "held_out")}
    assert found == {"train": "8ff3b9fb8175530e", "held_out": "df1e485761bb5286"}


def test_second_folder_has_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_digits(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_finished_folder_is_left_alone(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_digits(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_interrupted_writer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", stop)
        write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_slower_of_two_writers_is_content(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, True])  # nothing there at first; the other's folder when the rename fails
    monkeypatch.setattr(digits, "_complete", lambda _: next(answers))
    write_digits(folder)
    assert len(contents(folder)) == 1797


def test_other_contents_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something other"):
        write_digits(tmp_path / "digits")
    with pytest.raises(InputError, match="is a file"):
        write_digits(tmp_path / "digits" / "letter.txt")
    assert (tmp_path / "digits" / "letter.txt").read_text() == "mine"


def test_shipped_files_are_those_that_were_measured() -> None:
    assert uri.sha256((VAE / VAE_WEIGHTS).read_bytes()) == metrics(VAE)["sha256"]
    assert uri.sha256((CLASSIFIER / CLASSIFIER_WEIGHTS).read_bytes()) == metrics(CLASSIFIER)["sha256"]


def test_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for part in (VAE, CLASSIFIER) for path in part.iterdir()) <= 1_000_000


def test_shipped_config_tells_of_no_machine() -> None:
    assert "/" not in (VAE / "config.json").read_text()


def test_autoencoder_reaches_its_recorded_quality(vae: Vae) -> None:
    assert metrics(VAE)["held_out_psnr_db"] >= 36
    found = train_vae.reconstruction_psnr(vae, digit_images("held_out")[0])
    assert found == pytest.approx(metrics(VAE)["held_out_psnr_db"], abs=0.05)


def test_scaled_latents_are_standardised(vae: Vae) -> None:
    assert (vae.downsample, vae.channels) == (4, 4)
    mean, std = vae.encode(torch.from_numpy(digit_images("train")[0][:500]))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    latents = (mean + std * noise - vae.shift_factor) * vae.scaling_factor
    assert float(latents.mean()) == pytest.approx(0, abs=0.05)
    assert float(latents.std()) == pytest.approx(1, abs=0.05)


def test_classifier_reaches_its_recorded_accuracy(classifier: DemoDigits) -> None:
    assert metrics(CLASSIFIER)["held_out_accuracy"] >= 0.95
    found = classifier.accuracy(*digit_images("held_out"))
    assert found == pytest.approx(metrics(CLASSIFIER)["held_out_accuracy"], abs=0.004)


def test_classifier_reads_what_the_autoencoder_decodes(vae: Vae, classifier: DemoDigits) -> None:
    images, labels = digit_images("held_out")
    mean, std = vae.encode(torch.from_numpy(images))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    decoded = vae.decode((mean + std * noise - vae.shift_factor) * vae.scaling_factor)
    assert classifier.accuracy(decoded, labels) >= 0.95


def test_features_span_their_space(classifier: DemoDigits) -> None:
    features = classifier(digit_images("train")[0][:500]).double()
    assert int(torch.linalg.matrix_rank(torch.cov(features.T))) == classifier.dims


def test_few_steps_of_training_already_learn() -> None:
    images, labels = digit_images("train")
    classifier = DemoDigits(train_classifier.train(images, labels, steps=60), sha256="")
    assert classifier.accuracy(*digit_images("held_out")) > 0.5


@pytest.mark.parametrize("photographs", [False, True])
def test_vae_training_lowers_the_loss_and_saves_what_loads(photographs: bool, tmp_path: Path) -> None:
    images, _ = digit_images("train")
    torch.manual_seed(0)
    model = train_vae.build()
    pixels = torch.from_numpy(images[:64]).permute(0, 3, 1, 2) / 127.5 - 1
    before = train_vae.loss(model, pixels)[0].item()
    train_vae.train(model, images, 15, photographs)
    assert train_vae.loss(model, pixels)[0].item() < before / 2
    train_vae.save(model, tmp_path / "vae")
    loaded = load_vae(VaeRef(source=str(tmp_path / "vae")))
    assert {value.dtype for value in loaded.model.state_dict().values()} == {torch.float32}
    mean, _ = loaded.encode(torch.from_numpy(images[:8]))
    with torch.no_grad():
        expected = model.encode(pixels[:8]).latent_dist.mean
    torch.testing.assert_close(mean, expected, rtol=0.05, atol=0.02)  # saved in half precision
