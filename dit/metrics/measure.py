"""Features of sets of images taken with one extractor, and what the numbers depend on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from dit.devices import device
from dit.metrics.extractors.base import FeatureExtractor, Outputs
from dit.metrics.precision_recall import Mode
from dit.metrics.sets import ImageSet
from dit.metrics.summary import CONDITIONS, Names, Summary
from dit.ranks import Ranks
from storage.tracker import Tracker

STRETCH = 1024
"""Images that one rank takes the features of at a time. No number depends on which rank that is."""
KEPT_REFERENCE = 10_000
"""Features are kept of so many reference images, the first ones, since tars are shuffled. As in the published sets."""


@dataclass
class Measure:
    """Takes the features of sets of images on all ranks, and reports to the tracker how far it is."""

    extractor: FeatureExtractor
    tracker: Tracker
    total: int
    batch_size: int
    """Images in one pass of the extractor."""
    ranks: Ranks = field(default_factory=Ranks)
    done: int = 0

    def __call__(
        self, images: ImageSet, part: range | None = None, into: Summary | None = None, keep: int = 0
    ) -> Summary:
        """Add images to a summary, on the first rank alone: those of the others stay as they are.

        Stretches of images are dealt among the ranks. The first rank adds them in the images' order, so the
        summary has the same bits on any number of ranks.

        Args:
            images: what to measure.
            part: the numbers of those to add; all by default.
            into: the summary; an empty one by default.
            keep: of how many images, the first ones, the summary keeps the features.
        """
        summary = into or Summary(self.extractor.dims)
        part = range(images.count) if part is None else part
        stretches = [part[first : first + STRETCH] for first in range(0, len(part), STRETCH)]
        found = self._outputs(images, stretches[self.ranks.rank :: self.ranks.world_size])
        for _ in stretches[:: self.ranks.world_size]:
            for rank, outputs in enumerate(self.ranks.gathered(next(found, None))):
                if outputs:
                    summary.update(outputs.to(device()), keep)
                    self.passed(len(outputs.features) if rank else 0)
        return summary

    def _outputs(self, images: ImageSet, stretches: Sequence[range]) -> Iterator[Outputs]:
        """The outputs of each stretch, on the CPU."""
        batches = images.batches(self.batch_size, stretches)
        for stretch in stretches:
            parts = list[Outputs]()
            for batch in islice(batches, -(-len(stretch) // self.batch_size)):
                parts.append(self.extractor.outputs(torch.from_numpy(batch)).to("cpu"))
                self.passed(len(batch))
            yield Outputs.of(parts)

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
