"""Plots of metrics, as PNG bytes."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from dit.metrics.comparison import Estimate
from dit.metrics.power_law import PowerLaw
from dit.report.attention import NUMBERS, SHARES, Attention

if TYPE_CHECKING:  # only who draws waits for Matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

RECEIVED = 8
"""Attention that a token receives, in shares of what it would have if all were alike, at the ends of the colours."""
TICKS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
LOOKS = {
    "tokens": "tokens that a query looks at",
    "distance": "distance to them, in tokens",
    "changed": "share elsewhere than at first",
    "moved": "share elsewhere by the time itself",
}


def curve(
    steps: Sequence[int], losses: Sequence[float], held_out: Mapping[str, Sequence[tuple[int, float, float]]]
) -> bytes:
    """The loss against the training step, on a logarithmic axis.

    Args:
        steps: the steps.
        losses: the training loss of each.
        held_out: step, loss on held-out images and its standard error, by the name of the weights.
    """
    figure = _figure(6, 3.5)
    axes = figure.add_subplot()
    axes.plot(steps, losses, linewidth=1, marker=".", markersize=2, label="training")
    for name, points in held_out.items():
        at, values, errors = zip(*points, strict=True) if points else ((), (), ())
        axes.errorbar(at, values, errors, fmt="o-", capsize=2, markersize=3, linewidth=1, label=f"held out, {name}")
    if held_out:
        axes.legend(fontsize=8)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    return _png(figure)


def scaling(
    names: Sequence[str],
    distances: Sequence[Estimate],
    title: str,
    laws: Mapping[str, tuple[Sequence[float], PowerLaw]],
) -> bytes:
    """Distances of models against what they cost, with fitted lines, on logarithmic axes.

    Args:
        names: names of the models; their common beginning is left out.
        distances: distance of each model.
        title: name of the distance.
        laws: by name of a cost: the cost of each model, and the line through them.
    """
    from matplotlib.ticker import LogFormatter

    figure = _figure(5.5 * len(laws), 4)
    short = _without_common_start(names)
    for place, (cost, (x, law)) in enumerate(laws.items()):
        axes = figure.add_subplot(1, len(laws), place + 1)
        axes.set(xlabel=cost, ylabel=title, xscale="log", yscale="log")
        axes.set_title(str(law), fontsize=8)
        _errors(axes, x, distances, "o")
        ends = [min(x), max(x)]
        axes.plot(ends, [law(end) for end in ends], "--", color="grey", linewidth=1, zorder=0)
        for rank, (name, across, distance) in enumerate(zip(short, x, distances, strict=True)):
            beside = {"xytext": (-5, -10), "ha": "right"} if rank % 2 else {"xytext": (5, 5)}
            axes.annotate(name, (across, distance.value), textcoords="offset points", fontsize=7, **beside)
        axes.margins(x=0.15)
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.grid(visible=True, which="both", alpha=0.2)
    return _png(figure)


def over(
    axis: str, at: Sequence[float], distances: Sequence[Estimate], title: str, shares: Mapping[str, Sequence[float]]
) -> bytes:
    """Metrics against a number, such as the training step.

    Args:
        axis: name of the number.
        at: its values.
        distances: the distance at each of them.
        title: name of the distance.
        shares: metrics from 0 to 1 at each of them, by name.
    """
    figure = _figure(9, 3.5)
    left, right = figure.subplots(1, 2)
    _errors(left, at, distances, "o-")
    left.set(xlabel=axis, ylabel=title)
    for name, values in shares.items():
        right.plot(at, values, "o-", label=name, markersize=4)
    right.set(xlabel=axis, ylim=(0, 1))
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
    return _png(figure)


@dataclass(frozen=True)
class GuidanceLine:
    """Samples of one model that differ only in their guidance scale."""

    name: str
    """Name of the guidance."""
    scales: Sequence[float]
    distances: Sequence[Estimate]
    precision: Sequence[float]
    recall: Sequence[float]


def guidance(lines: Sequence[GuidanceLine], title: str) -> bytes:
    """The distance, and precision and recall, against the scale of guidance; ``title`` names the distance."""
    figure = _figure(9, 3.5)
    left, right = figure.subplots(1, 2)
    for place, line in enumerate(lines):
        _errors(left, line.scales, line.distances, "o-", label=line.name)
        right.plot(line.scales, line.precision, "o-", color=f"C{place}", label=f"precision, {line.name}", markersize=4)
        right.plot(line.scales, line.recall, "s--", color=f"C{place}", label=f"recall, {line.name}", markersize=4)
    left.set(xlabel="guidance scale", ylabel=title)
    right.set(xlabel="guidance scale", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=8)
    return _png(figure)


def attention(found: Attention) -> bytes:
    """The first sample on its way, what its tokens receive in each layer, and the numbers of the layers."""
    rows, columns = 2 + len(found.layers), len(found.times)
    figure = _figure(1.1 * columns + 1.6, 1.15 * rows + 3.2)
    (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.15 * rows, 3.2))
    cells = above.subplots(rows, columns, squeeze=False)
    for axes in cells.flat:
        axes.set(xticks=[], yticks=[])
    for axes, time in zip(cells[0], found.times, strict=True):
        axes.set_title(time, fontsize=8)
    for line, name, images in zip(cells, ("noisy", "expected"), (found.noisy, found.expected), strict=False):
        line[0].set_ylabel(name, fontsize=7)
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image)
    for line, layer in zip(cells[2:], found.layers, strict=True):
        line[0].set_ylabel(layer.name.replace(": ", "\n").replace(" in ", "\nin "), fontsize=7)
        for axes, received in zip(line, layer.received, strict=True):
            shown = axes.imshow(received, cmap="coolwarm", norm="log", vmin=1 / RECEIVED, vmax=RECEIVED)
    bar = above.colorbar(shown, ax=cells, extend="both", pad=0.01, aspect=50, format="%g", ticks=TICKS)
    bar.ax.tick_params(labelsize=6)
    bar.ax.minorticks_off()
    _layers(below, found)
    return _png(figure)


def _layers(figure: "SubFigure", found: Attention) -> None:
    """The numbers of each layer on the way."""
    places = figure.subplots(1, len(NUMBERS))
    for axes, name in zip(places, NUMBERS, strict=True):
        for layer in found.layers:
            _errors(axes, range(len(found.times)), layer.estimates(name), "o-", label=layer.name)
        axes.set_xticks(range(len(found.times)), found.times, rotation=60, fontsize=7)
        axes.set(ylim=(0, 1 if name in SHARES else None))
        axes.set_title(LOOKS[name], fontsize=8)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(visible=True, alpha=0.3)
    figure.legend(
        *places[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(found.layers), fontsize=7
    )


def _without_common_start(names: Sequence[str]) -> list[str]:
    """Names without their common first words: ``sweep-S-4`` and ``sweep-B-4`` become S-4 and B-4."""
    words = [name.split("-") for name in names]
    same = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))))
    return ["-".join(each[same:]) for each in words]


def _errors(axes: "Axes", x: Sequence[float], estimates: Sequence[Estimate], style: str, label: str = "") -> None:
    values, margins = [each.value for each in estimates], [each.margin for each in estimates]
    axes.errorbar(x, values, margins, fmt=style, capsize=3, markersize=4, linewidth=1, label=label)


def _figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
