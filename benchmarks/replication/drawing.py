"""Plots of distances with their 95 % intervals, as PNG bytes."""

import io
from collections.abc import Callable, Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.replication.runs import Run


def by_variant(runs: Sequence[Run]) -> bytes:
    """The distance of each variant, a point for each seed."""
    figure = Figure(figsize=(6, 0.6 + 0.5 * len({run.variant for run in runs})), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(run.variant for run in runs))
    rows = [names.index(run.variant) + 0.15 * (run.seed - 0.5) for run in runs]
    axes.errorbar([run.distance.value for run in runs], rows, xerr=[run.distance.margin for run in runs], fmt="o")
    axes.set(xlabel=runs[0].metrics.distance, yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
    axes.set_yticklabels(names)
    axes.grid(visible=True, axis="x", alpha=0.3)
    return _png(figure)


def against(axis: str, x: Callable[[Run], float], groups: Mapping[str, Sequence[Run]]) -> bytes:
    """The distance against a number on logarithmic axes, a line for each group.

    Args:
        axis: name of the number.
        x: the number of a run.
        groups: runs by the name of their line.
    """
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for place, (name, runs) in enumerate(groups.items()):
        line = sorted(runs, key=x)
        distances = [run.distance for run in line]
        values, margins = [each.value for each in distances], [each.margin for each in distances]
        style = ("o-", "s--", "^:")[place * 3 // max(len(groups), 10)]
        axes.errorbar([x(run) for run in line], values, margins, fmt=style, capsize=2, markersize=4, label=name)
    axes.set(xlabel=axis, ylabel=next(iter(groups.values()))[0].metrics.distance, xscale="log", yscale="log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
