"""Power laws: how a distance y falls as the compute x grows.

    y = a x^b    is a straight line in logarithms:    ln y = ln a + b ln x

Least squares over n points gives b = S_xy / S_xx, with S the sums of products of deviations from the means of ln x
and ln y. With residuals r_i, b has the variance s^2 / S_xx, s^2 = sum r_i^2 / (n - 2), and its 95 % interval is
b +- t sqrt(s^2 / S_xx), with t the 0.975 quantile of Student's t distribution with n - 2 degrees of freedom.
"""

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
    """Half the width of the exponent's 95 % interval; None of two points, through which a line always goes."""
    correlation: float
    """Pearson's r of the logarithms."""
    points: int

    def __call__(self, x: float) -> float:
        """The y of an x."""
        return float(self.coefficient * x**self.exponent)

    def __str__(self) -> str:
        interval = ""
        if self.margin is not None:
            interval = f" (exponent {self.exponent - self.margin:.2f} to {self.exponent + self.margin:.2f}, 95 %)"
        return f"{self.coefficient:.3g} * x^{self.exponent:.2f}{interval}, r {self.correlation:.2f}, {self.points} runs"


def fit(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """The power law of least squares in logarithms. Every point has the same weight.

    Raises:
        ValueError: there are fewer than two different x, or a number is not positive.

    Examples:
        >>> law = fit([1, 10, 100], [8.0, 4.4, 2.0])
        >>> print(law)
        8.26 * x^-0.30 (exponent -0.60 to 0.00, 95 %), r -1.00, 3 runs
    """
    if min(*x, *y) <= 0 or len(set(x)) < 2:
        raise ValueError("a power law needs positive numbers and at least two different x")
    log_x, log_y = np.log(x), np.log(y)
    slope, intercept = np.polyfit(log_x, log_y, 1)
    freedom = len(x) - 2
    ratio = np.square(log_y - slope * log_x - intercept).sum() / np.square(log_x - log_x.mean()).sum()
    margin = float(stdtrit(freedom, 0.975) * np.sqrt(ratio / freedom)) if freedom else None
    correlation = float(np.corrcoef(log_x, log_y)[0, 1])
    return PowerLaw(float(np.exp(intercept)), float(slope), margin, correlation, len(x))
