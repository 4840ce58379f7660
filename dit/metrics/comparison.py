"""Whether the metrics of two evaluations can be compared, and which are better."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from typing import Final, Literal, Self

Direction = Literal["lower", "higher"]
NFE: Final = "nfe"
"""Passes of the network for an image. It follows from the other conditions and the weights."""
OWN: Final = frozenset({"training_steps", "weights", "ema_std", "decoder_sha256", "samples", "seed", NFE})
"""Conditions of the samples themselves, which may differ. The interval covers another seed."""


@dataclass(frozen=True)
class Gain:
    """How much better one metric is than another."""

    value: float
    margin: float
    """Half the width of the 95 % interval of the value."""

    def exceeds(self, least: float) -> bool:
        """Whether the gain is above 0, and all of its interval at or above ``least``."""
        return self.value > 0 and self.value - self.margin >= least

    @property
    def verdict(self) -> Literal["better", "worse"]:
        """Which of the two it is; better if the metrics are equal."""
        return "better" if self.value >= 0 else "worse"

    def __str__(self) -> str:
        return f"{self.verdict} by {abs(self.value):.4g} ± {self.margin:.2g}"


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, metric: str, values: Mapping[str, float]) -> Self:
        """A metric with its interval from ``_low`` to ``_high``.

        Raises:
            KeyError: there is no such metric.
        """
        return cls(values[metric], values.get(f"{metric}_low"), values.get(f"{metric}_high"))

    @property
    def margin(self) -> float:
        """Half the width of the interval; 0 without one."""
        return 0.0 if self.low is None or self.high is None else (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.low is None else f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def differing(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Names of the conditions that differ, although metrics can be compared only if they are equal."""
    return sorted(name for name in (one.keys() | other.keys()) - OWN if one.get(name) != other.get(name))


def gain(metric: str, direction: Direction, old: Mapping[str, float], new: Mapping[str, float]) -> Gain:
    """How much better ``new`` is than ``old``.

    Both are estimates from independent samples, so the squares of their margins add up. A metric without an
    interval counts as exact.

    Raises:
        KeyError: one of them lacks the metric.

    Examples:
        >>> old = {"fd": 9.0, "fd_low": 8.0, "fd_high": 10.0}
        >>> new = {"fd": 5.0, "fd_low": 4.0, "fd_high": 6.0}
        >>> print(gain("fd", "lower", old, new))
        better by 4 ± 1.4
    """
    before, after = Estimate.of(metric, old), Estimate.of(metric, new)
    value = after.value - before.value
    return Gain(-value if direction == "lower" else value, hypot(before.margin, after.margin))
