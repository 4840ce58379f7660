"""The section on where the blocks of a DiffiT look while they make an image."""

from collections.abc import Iterator

from dit.report import plots
from dit.report.attention import NUMBERS, Attention, attention
from dit.sample import SampleManifest
from flows.report.html import Figure, Section, Table


def sections(samples: SampleManifest) -> Iterator[Section]:
    """The section of samples of a model with TMSA or one of its variants; none for another model.

    Raises:
        InputError, StorageError: as `attention`.
    """
    found = attention(samples)
    if found is None:
        return
    lead = (
        f"The first {found.samples} samples once more, from their noise and labels, by {found.way} and without "
        "guidance. The first of them is shown: with its noise, as the model expects it to become, and with what its "
        "tokens receive of the attention in three layers, 1 being what each has if all are alike. A token of the "
        "condition, if the model has one, takes its share of it."
    )
    note = (
        "Tokens: how many a query looks at, exp of the entropy of its weights. Distance: from the query to them, in "
        f"tokens. Changed: the share of the attention that is elsewhere than at {found.times[0]}. Moved: the share "
        f"that is elsewhere than if the layer were told {found.times[0]} with its tokens as they are, so what the time "
        "itself does. Means over queries, heads and samples, with 95 % intervals over the samples."
    )
    figure = Figure(plots.attention(found), "Attention on the way from noise (left) to an image (right)", plot=True)
    yield Section("Attention over the noise levels", [lead, figure, _table(found), note])


def _table(found: Attention) -> Table:
    """The numbers at the beginning, in the middle and at the end of the way."""
    last = len(found.times) - 1
    rows = [
        (layer.name, found.times[step], *(str(layer.estimates(name)[step]) for name in NUMBERS))
        for layer in found.layers
        for step in sorted({0, last // 2, last})
    ]
    return Table(("layer", "at", *NUMBERS), rows)
