"""Whether the numbers of two evaluations may be compared, and which are better."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from typing import Final, Literal, Self

Direction = Literal["lower", "higher"]
OWN: Final = frozenset({"training_steps", "weights", "decoder_sha256", "samples", "seed"})
"""Conditions that belong to what is judged and not to how. Another seed is what intervals are for."""


@dataclass(frozen=True)
class Gain:
    """How much better one number is than another, with half the width of the 95 % interval of that."""

    value: float
    margin: float

    def exceeds(self, least: float) -> bool:
        """Whether it is a gain at all, and all of its interval lies at or above ``least``."""
        return self.value > 0 and self.value - self.margin >= least

    def __str__(self) -> str:
        verb = "better" if self.value >= 0 else "worse"
        return f"{verb} by {abs(self.value):.4g} ± {self.margin:.2g}"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, metric: str, values: Mapping[str, float]) -> Self:
        """A metric with what lies from ``_low`` to ``_high``.

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
    """The conditions, by name, that numbers must share to be compared and that these do not."""
    return sorted(name for name in (one.keys() | other.keys()) - OWN if one.get(name) != other.get(name))


def gain(metric: str, direction: Direction, old: Mapping[str, float], new: Mapping[str, float]) -> Gain:
    """How much better ``new`` is than ``old``.

    Both are estimates from samples of their own, so the margins of their intervals, from ``_low`` to
    ``_high``, add in squares. A metric without an interval counts as exact.

    Raises:
        KeyError: one of them lacks the metric.
    """
    before, after = Estimate.of(metric, old), Estimate.of(metric, new)
    value = after.value - before.value
    return Gain(-value if direction == "lower" else value, hypot(before.margin, after.margin))
