"""Pictures of numbers, as PNG bytes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dit.metrics.comparison import Estimate


def curve(steps: Sequence[int], losses: Sequence[float]) -> bytes:
    """The loss against the training step, on a logarithmic axis."""
    figure = Figure(figsize=(6, 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, linewidth=1, marker=".", markersize=2)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    return _png(figure)


@dataclass(frozen=True)
class GuidanceLine:
    """Samples of one model that differ in the scale of their guidance alone."""

    name: str
    """How they are guided."""
    scales: Sequence[float]
    distances: Sequence[Estimate]
    precision: Sequence[float]
    recall: Sequence[float]


def guidance(lines: Sequence[GuidanceLine], title: str) -> bytes:
    """The distance, and precision and recall, against the scale of guidance; ``title`` names the distance."""
    figure = Figure(figsize=(9, 3.5), dpi=120, layout="constrained")
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


def _errors(axes: Axes, x: Sequence[float], found: Sequence[Estimate], style: str, label: str = "") -> None:
    values, margins = [each.value for each in found], [each.margin for each in found]
    axes.errorbar(x, values, margins, fmt=style, capsize=3, markersize=4, linewidth=1, label=label)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
