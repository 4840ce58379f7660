"""Summaries of sets of images, and the metrics that compare two of them."""

# N = images, B = batch, D = features

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

import torch
from torch import Tensor

from dit.devices import device
from dit.metrics.extractors.base import Outputs
from dit.metrics.frechet import Statistics
from dit.metrics.inception_score import SPLIT, InceptionScore
from dit.metrics.kernel import kernel_distance
from dit.metrics.precision_recall import NEIGHBOUR, Mode, precision_recall
from dit.metrics.resample import DRAWS, POINTS, fd_infinity, fd_standard_error
from storage.errors import InputError

SEED: Final = 0
CONDITIONS: Final[dict[str, str | int | float]] = {
    "metrics_seed": SEED,
    "metrics_dtype": "float32 features without TF32, float64 statistics",
    "score_split": SPLIT,
    "precision_recall_neighbour": NEIGHBOUR,
    "kernel": "(x y / D + 1)^3, unbiased, all pairs",
    "infinity_sizes": POINTS,
    "interval": f"95 %, normal, from {DRAWS} bootstrap resamples of the samples",
}


@dataclass
class Summary:
    """Statistics of all images of a set, and features of the first ones, for metrics that need single features."""

    dims: int
    """D."""
    statistics: Statistics = field(init=False)
    spatial: Statistics | None = None
    score: InceptionScore | None = None
    _kept: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.statistics = Statistics.empty(self.dims)

    def update(self, outputs: Outputs, keep: int = 0) -> None:
        """Add a batch, and keep its features until those of ``keep`` images are kept.

        Raises:
            InputError: a feature or logit is not finite.
        """
        room = max(keep - self.statistics.count, 0)
        if room:
            self._kept.append(outputs.features[:room].cpu().clone())  # a view would keep the whole batch in memory
        self.statistics = self.statistics.update(outputs.features)
        if outputs.spatial is not None:
            self.spatial = (self.spatial or Statistics.empty(outputs.spatial.shape[1])).update(outputs.spatial)
        if outputs.logits is not None:
            self.score = self.score or InceptionScore()
            self.score.update(outputs.logits)

    def features(self) -> Tensor:
        """The kept features, float32 (N, D), on the device."""
        return torch.cat([torch.empty(0, self.dims), *self._kept]).to(device())

    def tensors(self) -> dict[str, Tensor]:
        """Statistics and kept features by name, on the CPU, without the score: a reference needs none."""
        layers = {"pooled": self.statistics} | ({"spatial": self.spatial} if self.spatial else {})
        tensors = {f"{name}.count": torch.tensor(layer.count) for name, layer in layers.items()}
        tensors |= {f"{name}.mean": layer.mean for name, layer in layers.items()}
        tensors |= {f"{name}.m2": layer.m2 for name, layer in layers.items()}
        tensors["features"] = self.features().cpu()
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The summary that has these `tensors`.

        Raises:
            KeyError: one is missing.
        """
        layers = {
            name: Statistics(int(tensors[f"{name}.count"]), tensors[f"{name}.mean"], tensors[f"{name}.m2"])
            for name in ("pooled", "spatial")
            if name == "pooled" or f"{name}.mean" in tensors
        }
        return cls.from_statistics(layers["pooled"], layers.get("spatial"), tensors["features"])

    @classmethod
    def from_statistics(
        cls, statistics: Statistics, spatial: Statistics | None, features: Tensor | None = None
    ) -> Self:
        """A summary of known statistics, with or without features (N, D)."""
        summary = cls(len(statistics.mean), spatial)
        summary.statistics = statistics
        if features is not None:
            summary._kept.append(features)
        return summary


@dataclass(frozen=True)
class Names:
    """Names of the metrics. Only with the published Inception they are those of papers, such as ``fid``."""

    published: bool

    @property
    def distance(self) -> str:
        """The Fréchet distance: ``fid`` or ``fd``."""
        return "fid" if self.published else "fd"

    @property
    def spatial(self) -> str:
        """The Fréchet distance of the spatial features."""
        return "sfid" if self.published else "sfd"

    @property
    def kernel(self) -> str:
        """The kernel distance."""
        return "kid" if self.published else "kd"

    @property
    def score(self) -> str:
        """The inception score."""
        return "inception_score" if self.published else "classifier_score"


def check_counts(reference: int, samples: int) -> None:
    """Check that there are images enough for every metric.

    Args:
        reference: number of reference images.
        samples: number of samples.

    Raises:
        InputError: there are not.
    """
    if min(reference, samples) <= NEIGHBOUR:
        need = f"metrics need at least {NEIGHBOUR + 1} reference images and samples, not {reference:,} and {samples:,}"
        raise InputError(f"evaluate: {need}; set sample.count or evaluate=null, or add training images")


def compare(reference: Summary, samples: Summary, names: Names, modes: tuple[Mode, ...]) -> dict[str, float]:
    """The metrics of samples against a reference, by name.

    The Fréchet distance has a 95 % interval, ``_low`` to ``_high``, by resampling the samples, and
    ``_infinity``, its value at infinitely many samples. A reference without features has only the metrics
    that need statistics alone.

    Raises:
        InputError: a set has fewer than four images, or fewer than four kept features.
    """
    fd, reference_features, sample_features = names.distance, reference.features(), samples.features()
    value = reference.statistics.distance(samples.statistics)
    margin = 1.96 * fd_standard_error(reference.statistics, sample_features, SEED)
    metrics = {fd: value, f"{fd}_low": value - margin, f"{fd}_high": value + margin}
    metrics[f"{fd}_infinity"] = fd_infinity(reference.statistics, sample_features, SEED)
    if len(reference_features):
        metrics[names.kernel] = kernel_distance(reference_features, sample_features)
    for mode in modes if len(reference_features) else ():
        precision, recall = precision_recall(reference_features, sample_features, mode)
        suffix = mode.replace("-", "_")
        metrics |= {f"precision_{suffix}": precision, f"recall_{suffix}": recall}
    if reference.spatial and samples.spatial:
        metrics[names.spatial] = reference.spatial.distance(samples.spatial)
    if samples.score:
        metrics[names.score] = samples.score.value()
    return metrics
