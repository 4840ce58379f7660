"""The evaluation of one training run at several of its steps: what it consists of, what is done, and which is best.

A step that is no milestone any more, because training went past it before it was asked for, is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import PydanticCustomError

from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.export import CheckpointManifest
from dit.sample import SampleManifest
from dit.samplers.config import SampleConfig
from dit.training.config import TrainConfig
from dit.training.milestones import milestone_steps
from flows.contract import STAGES, Outcome
from flows.registry.config import PromotionRule
from flows.tracking.references import located
from storage.config import Config, problem
from storage.errors import InputError
from storage.manifest import Manifest
from storage.parallel import threads

AnyConfig = TypeVar("AnyConfig", bound=Config)
FIELD = "evaluate_milestones"


class MilestonesConfig(Config):
    """How the milestones are sampled and evaluated: as the recipe says, except for these values."""

    sample: dict[str, Any] = Field(default_factory=dict)
    """Values that replace those of ``sample``, such as ``{count: 10000}``. All milestones have the same noise and
    labels."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """Values that replace those of ``evaluate``, such as another ``extractor``."""


@dataclass(frozen=True)
class OverTraining:
    """The steps of a training run to evaluate, and how: all in the same way."""

    train: TrainConfig
    sample: SampleConfig
    evaluate: EvaluateConfig

    @classmethod
    def of(
        cls, asked: MilestonesConfig, train: TrainConfig, sample: SampleConfig, evaluate: EvaluateConfig | None
    ) -> Self:
        """Put the configs together.

        Raises:
            ValidationError: a value is wrong, or there are no milestones or no metrics.
        """
        if train.milestones is None:
            refuse(FIELD, (), "needs train.milestones, the steps to keep")
        if evaluate is None:
            refuse(FIELD, (), "needs evaluate.extractor")
        return cls(
            train,
            changed(FIELD, "sample", sample, asked.sample),
            changed(FIELD, "evaluate", evaluate, asked.evaluate),
        )

    @property
    def steps(self) -> list[int]:
        """The milestones and the last step, in rising order."""
        return [*milestone_steps(self.train.milestones, self.train.steps), self.train.steps]

    def configs(self, root: str) -> dict[int, TrainConfig]:
        """The configs of the runs that end at the steps, with a location in the place of what they start from."""
        train = located(self.train, root)
        return {step: train.model_copy(update={"steps": step, "milestones": None}) for step in self.steps}

    def checkpoints(self, root: str, latents: Manifest) -> dict[int, CheckpointManifest]:
        """The models that training has committed so far, by step.

        Raises:
            InputError: one of them is damaged or was made from other latents.
            StorageError: the store does not answer.
        """
        train, configs = STAGES["train"], self.configs(root)

        def committed(config: TrainConfig) -> Manifest | None:
            return train.output(root, config, latents).committed(train.kind)

        with threads(16) as pool:
            found = dict(zip(configs, pool.map(committed, configs.values()), strict=True))
        return {step: made for step, made in found.items() if isinstance(made, CheckpointManifest)}

    def evaluations(self, root: str, latents: Manifest) -> dict[int, MetricsManifest | None]:
        """The metrics of all models that training has committed, by step; None for one that is not evaluated.

        Raises: as `checkpoints`.
        """
        stages = (("sample", located(self.sample, root)), ("evaluate", self.evaluate))
        return {step: evaluation(root, made, stages) for step, made in self.checkpoints(root, latents).items()}


def evaluation(root: str, model: Manifest, stages: Sequence[tuple[str, Config]]) -> MetricsManifest | None:
    """The metrics that stages with these configs have made of a model, one after the other; None if they are not done.

    Raises:
        InputError: an output is damaged or was made from other bytes.
        StorageError: the store does not answer.
    """
    made: Manifest | None = model
    for name, config in stages:
        made = made and STAGES[name].output(root, config, made).committed(STAGES[name].kind)
    assert made is None or isinstance(made, MetricsManifest)
    return made


def best(evaluations: Mapping[int, MetricsManifest], rule: PromotionRule) -> int:
    """The step with the best metric by a rule; of equal ones the earliest.

    Raises:
        InputError: there is no such metric.
    """
    first = next(iter(evaluations.values()))
    metric, sign = rule.metric or first.metric, 1 if rule.direction == "lower" else -1
    if metric not in first.metrics:
        raise InputError(f"registry.rule.metric: no metric {metric}; choose one of {', '.join(sorted(first.metrics))}")
    return min(sorted(evaluations), key=lambda step: sign * evaluations[step].metrics[metric])


def evaluations_of(outcomes: Sequence[Outcome]) -> dict[int, MetricsManifest]:
    """The metrics by step, of the outcomes of milestones among others."""
    return {
        each.step: MetricsManifest.read(each.manifest)
        for each in outcomes
        if each.step is not None and each.name == MetricsManifest.STAGE
    }


def model_of(evaluation: MetricsManifest) -> CheckpointManifest:
    """The model that was evaluated.

    Raises:
        InputError: it is gone.
    """
    return evaluation.parent("samples", SampleManifest).parent("checkpoint", CheckpointManifest)


def changed(field: str, stage: str, config: AnyConfig, values: dict[str, Any]) -> AnyConfig:
    """The config of a stage with the other values that a field of the recipe gives.

    Raises:
        ValidationError: a value is wrong.
    """
    try:
        return type(config).model_validate(config.model_dump() | values)
    except ValidationError as error:
        wrong = problem(error, values)
        refuse(field, (stage, *filter(None, wrong.place.split("."))), wrong.message)


def refuse(field: str, place: tuple[str, ...], message: str) -> NoReturn:
    """Refuse what a field of the recipe says at a place.

    Raises:
        ValidationError: always.
    """
    error = PydanticCustomError("evaluation", "{said}", {"said": message})
    raise ValidationError.from_exception_data("Recipe", [{"type": error, "loc": (field, *place), "input": None}])
