"""The config and the manifest of the stage ``register``, and the rule for promotion.

Kept apart from `flows.registry.register`, which imports MLflow and takes seconds to import.
"""

from typing import Literal

from pydantic import Field

from dit.metrics.comparison import Direction
from storage.config import Config, operational
from storage.manifest import Manifest

VERSION = 2
CANDIDATE, CHAMPION = "candidate", "champion"


class PromotionRule(Config):
    """The rule by which a new version replaces the champion."""

    metric: str | None = None
    """Metric to compare. Default: the Fréchet distance, fid or fd."""
    direction: Direction = "lower"
    """Which values of the metric are better."""
    min_gain: float = Field(default=0.0, ge=0)
    """Least improvement in the metric's unit, after half the width of its 95 % interval is subtracted."""

    def __str__(self) -> str:
        return f"rule: {self.metric or 'distance'} {self.direction} by at least {self.min_gain:g} beyond its interval"


class RegisterConfig(Config):
    """How a model is registered in MLflow."""

    model_name: str = Field(default="ditflow", pattern=r'^[^/:?"\\\x00-\x1f\x7f-\x9f]+$', max_length=256)
    """Name of the registered model. It is part of MLflow's URIs and searches, so it has no / : ? " or backslash."""
    alias: str = Field(default=CANDIDATE, pattern=r"^[A-Za-z0-9_-]+$")
    """Alias that the new version receives."""
    checkpoint: Literal["last", "best"] = operational("last")
    """Which model is sampled, evaluated and registered: that of the last step, or the best of ``evaluate_milestones``
    by the metric and the direction of the rule."""
    promote: Literal["manual", "automatic"] = "manual"
    """Who makes a version champion: manual, a person with ditflow promote; automatic, the rule."""
    rule: PromotionRule = PromotionRule()
    """The rule for automatic promotion."""
    reevaluate: bool = operational(False)
    """Whether `ditflow up` evaluates champion and candidate again when a version is registered, with a new seed and as
    many samples as before."""


class ModelManifest(Manifest):
    """A version in the model registry."""

    STAGE = "register"

    model_name: str
    model_version: int
    alias: str
    promotion: str | None = None
    """What the rule decided and why; None if promotion is manual."""
