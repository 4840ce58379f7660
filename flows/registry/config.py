"""A version of a registered model: by which rules it enters the registry, and what a run leaves of it.

Apart from what needs MLflow, which takes seconds to import: most processes know of versions and make none.
"""

from typing import Literal

from pydantic import Field

from dit.metrics.comparison import Direction
from storage.config import Config
from storage.manifest import Manifest

VERSION = 2
CANDIDATE, CHAMPION = "candidate", "champion"


class PromotionRule(Config):
    """What a candidate must do better than the champion to take its place."""

    metric: str | None = None
    """Name of the metric; by default the Fréchet distance, `fid` or `fd`."""
    direction: Direction = "lower"
    """Which numbers are better."""
    min_gain: float = Field(0.0, ge=0)
    """How much better at least, in the metric's unit, once the 95 % interval of the difference is taken off."""

    def __str__(self) -> str:
        return f"rule: {self.metric or 'distance'} {self.direction} by {self.min_gain:g} beyond its interval"


class RegisterConfig(Config):
    """How a model enters the registry."""

    model_name: str = Field("ditflow", pattern=r"^[^/:]+$")
    """Name of the registered model."""
    alias: str = Field(CANDIDATE, pattern=r"^[A-Za-z0-9_-]+$")
    """Alias that the new version takes."""
    promote: Literal["manual", "automatic"] = "manual"
    """Whether the new version also becomes champion by itself when the rule says so."""
    rule: PromotionRule = PromotionRule()
    """What it must do better than the champion."""


class ModelManifest(Manifest):
    """A version in the model registry."""

    STAGE = "register"

    model_name: str
    model_version: int
    alias: str
    promotion: str | None = None
    """What the rule decided, and why; None if it was not asked."""
