"""The classifier as an ONNX file: the network in torch, the same bytes each time, and its published accuracy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.replication.classifier import (
    DEVIATION,
    MEAN,
    OUTPUTS,
    SIDE,
    WEIGHTS,
    Block,
    ResNet56,
    accuracy,
    exported,
    extractor,
)
from dit.evaluate import Classifier
from dit.metrics.extractors.load import load_extractor
from storage import uri
from storage.archives.open import open_archive

NAMES = tuple("abcdefghij")


@pytest.fixture
def network() -> ResNet56:
    torch.manual_seed(0)
    return ResNet56().requires_grad_(False).eval()


def test_the_file_is_the_network(network: ResNet56, tmp_path: Path) -> None:
    data = exported(network, SIDE)
    assert exported(network, SIDE) == data
    file = tmp_path / "resnet56.onnx"
    file.write_bytes(data)
    judge = load_extractor(extractor(str(file), uri.sha256(data), NAMES))
    assert isinstance(judge, Classifier)
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    x = torch.from_numpy(((images / 255 - MEAN) / DEVIATION).transpose(0, 3, 1, 2)).float()
    outputs = judge.outputs(images)
    for name, expected in zip(OUTPUTS, network(x), strict=True):
        torch.testing.assert_close(getattr(outputs, name), expected, rtol=1e-4, atol=1e-4)
    assert (outputs.features.shape, outputs.spatial.shape) == ((3, 64), (3, 448))  # type: ignore[union-attr]


def test_it_has_the_published_size(network: ResNet56) -> None:
    """0.85 million in table 6 of the paper; the sum is taken from its text by hand."""
    convolutions = 3 * 16 + 18 * 16 * 16 + 16 * 32 + 17 * 32 * 32 + 32 * 64 + 17 * 64 * 64
    norms = 2 * (19 * 16 + 18 * 32 + 18 * 64)
    assert sum(parameter.numel() for parameter in network.parameters()) == 9 * convolutions + norms + 64 * 10 + 10


def test_a_shortcut_has_no_weights() -> None:
    block, x = Block(2, 4).eval(), torch.rand(1, 2, 4, 4)
    torch.nn.init.zeros_(block.bn2.weight)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


@pytest.mark.full
@pytest.mark.data
def test_accuracy_on_photographs(cifar10: Path, tmp_path: Path) -> None:
    """83.2 % of the JPEGs, measured by others with another program."""
    network, _ = WEIGHTS.load(str(cifar10), None, lambda _: ResNet56())
    data = exported(network, SIDE)
    (tmp_path / "resnet56.onnx").write_bytes(data)
    archive = open_archive(str(cifar10 / "test.zip"))
    judge = load_extractor(extractor(str(tmp_path / "resnet56.onnx"), uri.sha256(data), archive.class_names))
    assert isinstance(judge, Classifier)
    assert accuracy(judge, archive) == pytest.approx(0.832, abs=5e-4)
