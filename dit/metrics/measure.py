"""Features of sets of images taken with one extractor, and what the numbers depend on."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dit.metrics.features import FeatureExtractor
from dit.metrics.precision_recall import Mode
from dit.metrics.summary import CONDITIONS, Names, Summary
from storage.tracking import Tracker

KEPT_REFERENCE = 10_000
"""Features are kept of so many reference images, the first ones, since tars are shuffled. As in the published sets."""


@dataclass
class Measure:
    """Takes the features of sets of images, and reports to the tracker how far it is."""

    extractor: FeatureExtractor
    tracker: Tracker
    total: int
    done: int = 0

    def __call__(self, batches: Iterable[NDArray[np.uint8]], into: Summary | None = None, keep: int = 0) -> Summary:
        """Add the images to a summary, which keeps the features of its first ``keep`` ones."""
        summary = into or Summary(self.extractor.dims)
        for batch in batches:
            summary.update(self.extractor.outputs(torch.from_numpy(batch)), keep)
            self.passed(len(batch))
        return summary

    def passed(self, count: int) -> None:
        """So many images are done, by whatever means."""
        self.done += count
        self.tracker.progress(self.done, self.total, "images")


def names(extractor: FeatureExtractor) -> Names:
    """What the numbers are called."""
    return Names(extractor.published)


def title(extractor: FeatureExtractor) -> str:
    """The distance with its feature space, such as ``FD[demo-digits@1a2b3c4d]``."""
    return f"{names(extractor).distance.upper()}[{extractor.name}@{extractor.sha256[:8]}]"


def modes(extractor: FeatureExtractor) -> tuple[Mode, ...]:
    """In which precisions precision and recall are taken."""
    return ("adm-fp16", "fp32") if extractor.name == "inception-tf" else ("fp32",)


def conditions(extractor: FeatureExtractor) -> dict[str, str | int | float]:
    """What numbers taken with an extractor must be published with, but for the images."""
    return {
        "extractor": extractor.name,
        "extractor_version": extractor.version,
        "extractor_sha256": extractor.sha256,
        "extractor_preprocessing": extractor.preprocessing,
        "precision_recall_modes": ", ".join(modes(extractor)),
        **CONDITIONS,
    }
