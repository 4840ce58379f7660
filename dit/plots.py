"""Pictures of numbers, as PNG bytes."""

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def curve(steps: Sequence[int], losses: Sequence[float]) -> bytes:
    """The loss against the training step, on a logarithmic axis."""
    figure = Figure(figsize=(6, 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, linewidth=1, marker=".", markersize=2)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
