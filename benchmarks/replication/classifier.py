"""A classifier of CIFAR-10 as an ONNX file, for ``evaluate.extractor``.

``python -m benchmarks.replication.classifier <folder> cifar10/resnet56.onnx`` reads ``resnet56.safetensors`` and
``test.zip`` from the folder, and prints what a recipe says of the file, and its accuracy.
"""

# B = batch, C = channels, h = side of a feature map

import argparse
import io
from itertools import starmap
from typing import Final

import numpy as np
import onnx
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from dit.evaluate import Classifier
from dit.metrics.extractors.load import ExtractorRef, load_extractor
from dit.metrics.extractors.onnx_file import OnnxNetwork
from dit.weights import WeightsFile
from storage import uri
from storage.archives.open import Archive, open_archive
from storage.images.transforms import load

WEIGHTS: Final = WeightsFile(
    "resnet56.safetensors",
    title="ResNet-56",
    hint="needs the weights of akamaster/pytorch_resnet_cifar10 as safetensors",
)
SIDE: Final = 32
MEAN: Final = (0.485, 0.456, 0.406)
DEVIATION: Final = (0.229, 0.224, 0.225)
OUTPUTS: Final = ["features", "logits", "spatial"]
SPATIAL_CHANNELS: Final = 7
"""As many as sFID takes of Inception's."""
OPSET: Final = 17
BATCH: Final = 100


class Block(nn.Module):
    """Two convolutions beside a shortcut without weights."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.stride, self.added = width // width_in, (width - width_in) // 2
        self.conv1 = nn.Conv2d(width_in, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, h) to the same, or to (B, 2 C, h / 2, h / 2)."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.added, self.added))
        return F.relu(inner + shortcut)


class ResNet56(nn.Module):
    """The network of He et al., arXiv 1512.03385, section 4.2, with shortcuts of option A."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = starmap(_stage, ((16, 16), (16, 32), (32, 64)))
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, 64), logits (B, 10) and spatial features (B, 448) of normalised images (B, 3, 32, 32).

        The spatial features are the first 7 channels before the pool, with the channel as the fastest index.
        """
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images))))))
        features = x.mean((2, 3))
        return features, self.linear(features), x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def _stage(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(Block(width_in, width), *(Block(width, width) for _ in range(8)))


def exported(network: nn.Module, side: int, batch: int | None = None) -> bytes:
    """A network of images (B, 3, side, side) as an ONNX file with the outputs `OUTPUTS`: the same bytes each time.

    Args:
        network: gives features, logits and spatial features.
        side: of the images, in pixels.
        batch: B, if the file is for one number of images alone.
    """
    buffer = io.BytesIO()
    torch.onnx.export(
        network,
        (torch.zeros(batch or 1, 3, side, side),),
        buffer,  # type: ignore[arg-type]  # takes files, too
        input_names=["images"],
        output_names=OUTPUTS,
        dynamic_axes=None if batch else {name: {0: "batch"} for name in ("images", *OUTPUTS)},
        opset_version=OPSET,
        dynamo=False,
    )
    model = onnx.load_model_from_string(buffer.getvalue())
    model.producer_name = model.producer_version = ""  # another version of torch makes the same file
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def accuracy(classifier: Classifier, archive: Archive) -> float:
    """The share in 0..1 of images of an archive that are given the class of their folder."""
    right = 0
    for first in range(0, len(archive.members), BATCH):
        members = archive.members[first : first + BATCH]
        found = classifier.classify(np.stack([load(archive.read(member), SIDE) for member in members]))
        right += int((found == torch.tensor([member.label for member in members])).sum())
    return right / len(archive.members)


def extractor(file: str, sha256: str, class_names: tuple[str, ...]) -> ExtractorRef:
    """What a recipe says of the file."""
    network = OnnxNetwork(
        name="resnet56",
        side=SIDE,
        mean=MEAN,
        deviation=DEVIATION,
        logits="logits",
        spatial="spatial",
        class_names=class_names,
    )
    return ExtractorRef(name="onnx", weights=file, sha256=sha256, onnx=network)


def main() -> None:
    """Write the file, measure it, and print the value of ``evaluate.extractor``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="with resnet56.safetensors and test.zip")
    parser.add_argument("file", help="ONNX file to write")
    options = parser.parse_args()
    data = exported(WEIGHTS.load(options.folder, None, lambda _: ResNet56())[0], SIDE)
    uri.write(options.file, data)
    archive = open_archive(uri.join(options.folder, "test.zip"))
    ref = extractor(options.file, uri.sha256(data), archive.class_names)
    classifier = load_extractor(ref)
    assert isinstance(classifier, Classifier)
    print(yaml.safe_dump({"extractor": ref.model_dump(mode="json", exclude_defaults=True)}, sort_keys=False))
    print(f"accuracy on test.zip: {accuracy(classifier, archive):.2%}")


if __name__ == "__main__":
    main()
