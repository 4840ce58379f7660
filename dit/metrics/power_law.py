"""A straight line between logarithms: how a number falls as something grows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x ** exponent."""

    coefficient: float
    exponent: float
    margin: float | None
    """Half the width of the exponent's 95 % interval (Student's t); None from two points, which any line fits."""
    correlation: float
    """Of the logarithms (Pearson's r)."""
    points: int

    def __call__(self, x: float) -> float:
        """The y of the line."""
        return float(self.coefficient * x**self.exponent)

    def __str__(self) -> str:
        low_high = ""
        if self.margin is not None:
            low_high = f" (exponent {self.exponent - self.margin:.2f} to {self.exponent + self.margin:.2f}, 95 %)"
        return f"{self.coefficient:.3g} * x^{self.exponent:.2f}{low_high}, r {self.correlation:.2f}, {self.points} runs"


def fit(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """The line of least squares between log x and log y, every point with the same weight.

    Raises:
        ValueError: there are fewer than two different x, or a number is not positive.
    """
    if min(*x, *y) <= 0 or len(set(x)) < 2:
        raise ValueError("a power law needs positive numbers at two different places at least")
    across, up = np.log(x), np.log(y)
    slope, start = np.polyfit(across, up, 1)
    free = len(x) - 2
    spread = np.square(up - slope * across - start).sum() / np.square(across - across.mean()).sum()
    margin = float(stdtrit(free, 0.975) * np.sqrt(spread / free)) if free else None
    return PowerLaw(float(np.exp(start)), float(slope), margin, float(np.corrcoef(across, up)[0, 1]), len(x))
