"""Features of sets of images by one extractor, and what the metrics depend on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from dit.devices import device
from dit.metrics.extractors.base import FeatureExtractor, Outputs
from dit.metrics.precision_recall import Mode
from dit.metrics.sets import ImageSet, batch_ranges
from dit.metrics.summary import CONDITIONS, Names, Summary
from dit.ranks import Ranks
from storage.tracker import Tracker

RANGE = 1024
"""Images that one rank measures at a time. The metrics do not depend on which rank that is."""
KEPT_REFERENCE = 10_000
"""Reference images whose features are kept, as many as in ADM's files. The first ones will do: tars are shuffled."""


@dataclass
class Measure:
    """Measures sets of images on all ranks, and reports progress to the tracker."""

    extractor: FeatureExtractor
    tracker: Tracker
    total: int
    """Images to measure, over all sets."""
    batch_size: int
    """Images in one pass of the extractor."""
    ranks: Ranks = field(default_factory=Ranks)
    done: int = 0
    """Images measured so far."""

    def __call__(
        self, images: ImageSet, part: range | None = None, into: Summary | None = None, keep: int = 0
    ) -> Summary:
        """Add images to a summary. All ranks must call this; only the first rank's summary is complete.

        Ranks take turns at ranges of `RANGE` images. The first rank adds their outputs in the images' order, so
        the summary has the same bits on any number of ranks.

        Args:
            images: the images to measure.
            part: indices of those to add; all by default.
            into: the summary to add to; an empty one by default.
            keep: number of images, the first ones, whose features the summary keeps.
        """
        summary = into or Summary(self.extractor.dims)
        part = range(images.count) if part is None else part
        ranges = list(batch_ranges(RANGE, [part]))
        own_outputs = self._outputs(images, ranges[self.ranks.rank :: self.ranks.world_size])
        for _ in ranges[:: self.ranks.world_size]:
            for rank, outputs in enumerate(self.ranks.gathered(next(own_outputs, None))):
                if outputs:
                    summary.update(outputs.to(device()), keep)
                    self.advance(len(outputs.features) if rank else 0)
        return summary

    def _outputs(self, images: ImageSet, ranges: Sequence[range]) -> Iterator[Outputs]:
        """The outputs of each range, on the CPU."""
        batches = images.batches(self.batch_size, ranges)
        for part in ranges:
            parts = list[Outputs]()
            for batch in islice(batches, -(-len(part) // self.batch_size)):
                parts.append(self.extractor.outputs(torch.from_numpy(batch)).to("cpu"))
                self.advance(len(batch))
            yield Outputs.of(parts)

    def advance(self, count: int) -> None:
        """Report that ``count`` more images are measured."""
        self.done += count
        self.tracker.progress(self.done, self.total, "images")


def names(extractor: FeatureExtractor) -> Names:
    """Names of the metrics."""
    return Names(extractor.published)


def title(extractor: FeatureExtractor) -> str:
    """The distance with its feature space, such as ``FD[demo-digits@1a2b3c4d]``."""
    return f"{names(extractor).distance.upper()}[{extractor.name}@{extractor.sha256[:8]}]"


def modes(extractor: FeatureExtractor) -> tuple[Mode, ...]:
    """The arithmetic in which precision and recall are computed."""
    return ("adm-fp16", "fp32") if extractor.name == "inception-tf" else ("fp32",)


def conditions(extractor: FeatureExtractor) -> dict[str, str | int | float]:
    """What metrics by an extractor depend on, besides the images: publish it with them."""
    return {
        "extractor": extractor.name,
        "extractor_version": extractor.version,
        "extractor_sha256": extractor.sha256,
        "extractor_preprocessing": extractor.preprocessing,
        "precision_recall_modes": ", ".join(modes(extractor)),
        **CONDITIONS,
    }
