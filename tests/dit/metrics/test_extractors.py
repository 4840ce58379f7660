from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from dit.metrics.extractors.base import FeatureExtractor
from dit.metrics.extractors.demo_digits import WEIGHTS, DemoDigits, DigitsClassifier, load_digits_classifier
from dit.metrics.extractors.load import EXTRACTORS, ExtractorRef, load_extractor, weights_sha256
from storage import uri
from storage.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    (tmp_path / WEIGHTS).write_bytes(safetensors.torch.save(DigitsClassifier().state_dict()))
    return tmp_path


def pictures(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def by_hand(weights: dict[str, torch.Tensor], images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits written out from the names in the file."""
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1
    for layer in (0, 3, 6):
        x = F.conv2d(x, weights[f"trunk.{layer}.weight"], weights[f"trunk.{layer}.bias"], padding=1)
        x = F.max_pool2d(x * torch.sigmoid(x), 2)
    x = x.flatten(1) @ weights["trunk.10.weight"].T + weights["trunk.10.bias"]
    features = x * torch.sigmoid(x)
    return features, features @ weights["head.weight"].T + weights["head.bias"]


def test_features_and_labels_follow_the_weights(folder: Path) -> None:
    classifier = load_digits_classifier(str(folder))
    features, logits = by_hand(safetensors.torch.load_file(folder / WEIGHTS), pictures())
    found = classifier(pictures())
    assert found.dtype == torch.float32
    assert found.shape == (5, classifier.dims)
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(classifier.logits(pictures()), logits, rtol=1e-4, atol=1e-5)
    labels = classifier.classify(torch.from_numpy(pictures()))
    assert labels.dtype == torch.int64
    assert labels.tolist() == logits.argmax(1).tolist()


def test_accuracy_is_the_share_of_agreement(folder: Path) -> None:
    classifier = load_digits_classifier(str(folder))
    labels = classifier.classify(pictures()).numpy()
    assert classifier.accuracy(pictures(), labels) == 1
    labels[:2] = (labels[:2] + 1) % 10
    assert classifier.accuracy(pictures(), labels) == pytest.approx(0.6)


def test_folder_file_and_url_are_one(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    fsspec.filesystem("memory").pipe_file(f"/digits/{WEIGHTS}", data)
    for place in (str(folder), str(folder / WEIGHTS), "memory://digits"):
        extractor = load_extractor(ExtractorRef(weights=place, sha256=uri.sha256(data)))
        assert extractor.sha256 == uri.sha256(data)


def test_extractor_says_what_it_is(folder: Path) -> None:
    extractor: FeatureExtractor = load_extractor(ExtractorRef(weights=str(folder)))
    assert isinstance(extractor, DemoDigits)
    assert (extractor.name, extractor.version, extractor.dims) == ("demo-digits", 1, 64)
    assert extractor.preprocessing
    assert ExtractorRef(weights=str(folder)).identity() == {"name": "demo-digits"}


def test_features_do_not_depend_on_the_batch(folder: Path) -> None:
    classifier = load_digits_classifier(str(folder))
    alone = torch.cat([classifier(pictures()[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(classifier(pictures()), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 64, 64, 3), np.uint8),
        np.zeros((1, 32, 32, 3), np.float32),
        np.zeros((1, 3, 32, 32), np.uint8),
        np.zeros((1, 16, 8, 3), np.uint8),
    ],
)
def test_other_images_are_refused(folder: Path, images: np.ndarray) -> None:
    with pytest.raises(InputError, match="demo-digits: needs square uint8 images of at most 32x32x3"):
        load_digits_classifier(str(folder))(images)


def test_smaller_images_are_enlarged(folder: Path) -> None:
    classifier, small = load_digits_classifier(str(folder)), pictures()[:, :16, :16]
    large = F.interpolate(torch.from_numpy(small).permute(0, 3, 1, 2).float(), scale_factor=2, mode="bicubic")
    features, logits = classifier.network(large.permute(0, 2, 3, 1))
    torch.testing.assert_close(classifier(small), features)
    torch.testing.assert_close(classifier.logits(small), logits)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}/none/{WEIGHTS}: no such object"):
        load_digits_classifier(str(tmp_path / "none"))


def test_altered_weights_are_caught_by_the_hash(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    expected = uri.sha256(bytes(data))
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(InputError, match=f"{WEIGHTS}: its sha256 is {uri.sha256(bytes(data))}.*{expected}"):
        load_extractor(ExtractorRef(weights=str(folder), sha256=expected))


@pytest.mark.parametrize("name", EXTRACTORS)
def test_hash_of_the_weights_is_had_without_the_network(tmp_path: Path, name: str) -> None:
    file, data = tmp_path / EXTRACTORS[name].file.name, b"no network can be made of this"
    with pytest.raises(InputError, match=f"{file.name}: no such object.*{name} reads {file.name}"):
        weights_sha256(ExtractorRef(name=name, weights=str(tmp_path)))
    file.write_bytes(data)
    for place in (file, tmp_path):
        assert weights_sha256(ExtractorRef(name=name, weights=str(place))) == uri.sha256(data)
    with pytest.raises(InputError, match=f"its sha256 is {uri.sha256(data)}, not the expected {64 * '0'}"):
        weights_sha256(ExtractorRef(name=name, weights=str(file), sha256=64 * "0"))


@pytest.mark.parametrize(
    "data",
    [b"", b"not weights at all", safetensors.torch.save({"head.weight": torch.zeros(1)})],
    ids=["empty", "text", "other"],
)
def test_broken_weights_are_refused_in_one_line(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(InputError, match="not the weights of the digits classifier|is empty; fetch it again") as caught:
        load_digits_classifier(str(folder))
    assert "\n" not in str(caught.value)


def test_unknown_extractor_is_refused() -> None:
    with pytest.raises(ValidationError, match="'demo-digits', 'inception-tf', 'dinov2' or 'onnx'"):
        ExtractorRef.model_validate({"name": "inception", "weights": "."})
