"""Whether the numbers of two evaluations may be compared, and which are better."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from typing import Final, Literal

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
    value = new[metric] - old[metric]
    return Gain(-value if direction == "lower" else value, hypot(margin(metric, old), margin(metric, new)))


def margin(metric: str, values: Mapping[str, float]) -> float:
    """Half the width of a metric's interval; 0 for one without."""
    low, high = values.get(f"{metric}_low"), values.get(f"{metric}_high")
    return 0.0 if low is None or high is None else (high - low) / 2
