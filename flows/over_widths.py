"""The evaluation of averages of several widths, which are made of one training run afterwards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

from pydantic import Field

from dit.average import AverageConfig
from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.samplers.config import SampleConfig
from dit.training.config import TrainConfig
from dit.training.power import MAX_WIDTH
from flows.contract import Outcome
from flows.over_training import changed, evaluation, refuse
from flows.tracking.references import located
from storage.config import Config
from storage.manifest import Manifest

FIELD = "evaluate_widths"


class WidthsConfig(Config):
    """Averages of several widths, which are sampled and evaluated as the recipe says, except for these values."""

    stds: tuple[Annotated[float, Field(gt=0, lt=MAX_WIDTH)], ...] = Field(min_length=1)
    """Relative widths of the averages, as ``average.std``."""
    step: int | None = Field(default=None, ge=1)
    """Training step at which the averages end, as ``average.step``. Null: the last step."""
    sample: dict[str, Any] = Field(default_factory=dict)
    """Values that replace those of ``sample``, such as ``{count: 10000}``. All widths have the same noise and
    labels."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """Values that replace those of ``evaluate``, such as another ``extractor``."""


@dataclass(frozen=True)
class OverWidths:
    """The averages to evaluate, by width, and how: all in the same way."""

    averages: Mapping[float, AverageConfig]
    sample: SampleConfig
    evaluate: EvaluateConfig

    @classmethod
    def of(cls, asked: WidthsConfig, train: TrainConfig, sample: SampleConfig, evaluate: EvaluateConfig | None) -> Self:
        """Put the configs together.

        Raises:
            ValidationError: a value is wrong, or there are no tracked averages or no metrics.
        """
        if not train.ema_power:
            refuse(FIELD, (), "needs train.ema_power, the averages to make others from")
        if evaluate is None:
            refuse(FIELD, (), "needs evaluate.extractor")
        if asked.step is not None and asked.step > train.steps:
            refuse(FIELD, ("step",), f"{asked.step:,} is after the last step of training, {train.steps:,}")
        return cls(
            {std: AverageConfig(std=std, step=asked.step) for std in sorted(set(asked.stds))},
            changed(FIELD, "sample", sample, {"weights": "ema"} | asked.sample),
            changed(FIELD, "evaluate", evaluate, asked.evaluate),
        )

    def stages(self, std: float) -> list[tuple[str, Config]]:
        """The stages of a width with their configs, each of which reads the one before."""
        return [("average", self.averages[std]), ("sample", self.sample), ("evaluate", self.evaluate)]

    def evaluations(self, root: str, trained: Manifest) -> dict[float, MetricsManifest | None]:
        """The metrics of the averages of a run by width; None for one that is not evaluated.

        Raises:
            InputError: an output is damaged or was made from other bytes.
            StorageError: the store does not answer.
        """
        asked = replace(self, sample=located(self.sample, root))
        return {std: evaluation(root, trained, asked.stages(std)) for std in self.averages}


def evaluations_of(outcomes: Sequence[Outcome]) -> dict[float, MetricsManifest]:
    """The metrics by width, of the outcomes of averages among others."""
    return {
        each.std: MetricsManifest.read(each.manifest)
        for each in outcomes
        if each.std is not None and each.name == MetricsManifest.STAGE
    }
