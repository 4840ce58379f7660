"""A training run to an average of its weights of any width, made afterwards (EDM2).

The run has tracked power-function averages (``train.ema_power``), and its milestones keep them. They are its
snapshots: outputs of their own, of the same training with fewer steps. `dit.training.power` says how they are added up.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field, ValidationError
from safetensors.torch import load as load_tensors
from torch import Tensor

from dit.export import EMA_WEIGHTS, CheckpointManifest, ModelCard, export, power_average, weights_file
from dit.models.cost import cost
from dit.training.config import TrainConfig
from dit.training.milestones import milestone_steps
from dit.training.power import MAX_WIDTH, Profile, combination, exponent
from dit.training.shorter import runs_of_fewer_steps
from storage import uri
from storage.config import Config
from storage.errors import InputError
from storage.estimate import PlanContext, StageCost
from storage.manifest import Manifest, StageOutput, is_finished
from storage.stage import StageDefinition
from storage.tracker import Tracker, publish

VERSION = 1
COEFFICIENTS = "coefficients.json"
MOST_ERROR = 0.1
"""Largest distance of the combined profile from the wanted one, as a share of its norm."""
BYTES_A_SECOND = 4e8
"""Of weights that a CPU core reads, compares with their hash and adds up, as measured."""

Coefficients = dict[tuple[int, float], float]
"""How much the average of a step and a tracked width counts."""


class AverageConfig(Config):
    """Which average of a run's weights is made."""

    std: float = Field(gt=0, lt=MAX_WIDTH)
    """Relative width of the average: the standard deviation of the steps that count, as a share of ``step``. Widths
    near the tracked ones of ``train.ema_power``, half to twice, need few milestones."""
    step: int | None = Field(default=None, ge=1)
    """Training step at which the average ends. It should be one of ``train.milestones``. Null: the last step."""


class AverageManifest(CheckpointManifest):
    """A trained model whose only weights, ``ema``, are an average made afterwards."""

    STAGE = "average"


def run(
    config: AverageConfig, checkpoint: CheckpointManifest, *, out: StageOutput, tracker: Tracker
) -> AverageManifest:
    """Add up the snapshots of a run, and commit the model.

    Raises:
        InputError: the run has no such average, or a snapshot was made again with other bytes.
        StorageError: a snapshot is missing or damaged, or the disk is full.
    """
    training = _training(checkpoint)
    made = out.manifest(AverageManifest, card=checkpoint.card)
    snapshots = {found.card.steps: found for found in _kept(made, checkpoint)}
    coefficients, error = _coefficients(config, training, sorted(snapshots))
    weights = _sum(snapshots, coefficients, tracker)
    step = _step(config, training)
    card, files = export(out, _card(config, checkpoint, step), {EMA_WEIGHTS: weights})
    counts = {"steps": step, "images_seen": step * training.batch_size, "averages": len(coefficients)}
    counts["parameters"] = checkpoint.counts["parameters"]
    return out.commit(
        AverageManifest,
        [*files, publish(out, tracker, COEFFICIENTS, _described(coefficients, error))],
        counts=counts,
        metrics={"profile_error": error},
        card=card,
    )


def parents(config: AverageConfig, checkpoint: CheckpointManifest) -> dict[str, Manifest]:
    """The snapshots up to the step, by name; the run itself is none of them.

    Raises:
        InputError: the source is no training run.
        StorageError: the store does not answer.
    """
    step = _step(config, _training(checkpoint))
    return {f"snapshot {found.card.steps}": found for found in _shorter(checkpoint) if found.card.steps <= step}


def check(config: AverageConfig, checkpoint: CheckpointManifest, _: PlanContext) -> None:
    """Check that the average can be made, of a run that may not be trained yet.

    Raises:
        InputError: it cannot.
    """
    training = _training(checkpoint)
    _coefficients(config, training, _steps(checkpoint, training))


def estimate(config: AverageConfig, checkpoint: CheckpointManifest, _: PlanContext) -> StageCost:
    """What it takes to make the average."""
    training, size = _training(checkpoint), cost(checkpoint.card.model).memory["ema"]
    step = _step(config, training)
    read = sum(other <= step for other in _steps(checkpoint, training)) * len(training.ema_power)
    card = _card(config, checkpoint, step).model_copy(update={"weights": {EMA_WEIGHTS: ""}})
    return StageCost(
        images=0, objects=4, size=size, units=1, done=0, seconds=read * size / BYTES_A_SECOND, leaves={"card": card}
    )


def _training(checkpoint: CheckpointManifest) -> TrainConfig:
    where = uri.redact(checkpoint.uri)
    if checkpoint.stage != CheckpointManifest.STAGE:
        raise InputError(f"average: {where} is an average itself; name the training run that it was made from")
    try:
        return TrainConfig.model_validate(checkpoint.config)
    except ValidationError as error:
        raise InputError(f"average: {where} was trained by another version of ditflow") from error


def _step(config: AverageConfig, training: TrainConfig) -> int:
    return training.steps if config.step is None else config.step


def _shorter(checkpoint: CheckpointManifest) -> list[CheckpointManifest]:
    """The snapshots besides the run itself, by step; of several of one step, the first that was made comes last."""
    training = _training(checkpoint)
    if training.decay != "none":  # it has not passed through a run of fewer steps
        return []
    found = runs_of_fewer_steps(StageOutput(uri=checkpoint.uri, header=checkpoint), training)
    return sorted(found, key=lambda each: (each.card.steps, -each.rerun))


def _steps(checkpoint: CheckpointManifest, training: TrainConfig) -> list[int]:
    """The steps that have a snapshot, or will have one once the run is trained."""
    there = {found.card.steps for found in _shorter(checkpoint)}
    coming = () if is_finished(checkpoint.uri) else milestone_steps(training.milestones, training.steps)
    return sorted({training.steps, *there, *coming})


def _kept(made: AverageManifest, checkpoint: CheckpointManifest) -> Iterator[CheckpointManifest]:
    """The run and the snapshots that the name of the output was made of, whatever was committed since."""
    yield checkpoint
    for name in made.parents:
        if name.startswith("snapshot "):
            yield made.parent(name, CheckpointManifest)


def _coefficients(config: AverageConfig, training: TrainConfig, steps: Sequence[int]) -> tuple[Coefficients, float]:
    """The coefficients of the snapshots of these steps, and the error.

    Raises:
        InputError: the run has no such averages, the step is outside of it, or the error is too large.
    """
    step, widths = _step(config, training), sorted(set(training.ema_power))
    if not widths:
        raise InputError("average: the run has tracked no averages to make others from; train with train.ema_power")
    if step > training.steps:
        raise InputError(f"average.step: {step:,} is after the last step of the run, {training.steps:,}")
    if step < steps[0]:
        raise InputError(f"average.step: the run has no snapshot up to step {step:,}; train.milestones keeps them")
    keys = [(other, width) for other in steps if other <= step for width in widths]
    profiles = [Profile(other, exponent(width)) for other, width in keys]
    found, error = combination(profiles, Profile(step, exponent(config.std)))
    if error > MOST_ERROR:
        said = f"at step {step:,} the snapshots give a width of {config.std:g} only to within {error:.0%}"
        near = f"widths near {' and '.join(map(str, widths))}, and steps with a snapshot, such as {keys[-1][0]:,}"
        raise InputError(f"average.std: {said}, not {MOST_ERROR:.0%}; choose {near}, or keep more train.milestones")
    return dict(zip(keys, found.tolist(), strict=True)), error


def _sum(
    snapshots: Mapping[int, CheckpointManifest], coefficients: Coefficients, tracker: Tracker
) -> dict[str, Tensor]:
    """The weighted sum of the snapshots' averages, in float64, by parameter name.

    Differences from the last one are added up: as the coefficients add up to 1 it is the same, and a parameter that
    was not trained keeps its bits.
    """
    *earlier, (newest, width) = coefficients
    last = _read(snapshots[newest], width)
    sums = {name: tensor.double() for name, tensor in last.items()}
    for number, (step, width) in enumerate(earlier, start=1):
        for name, tensor in _read(snapshots[step], width).items():
            sums[name].add_(tensor.double() - last[name].double(), alpha=coefficients[step, width])
        tracker.progress(number, len(earlier), "averages")
    return {name: total.float() for name, total in sums.items()}


def _read(snapshot: CheckpointManifest, width: float) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_tensors(snapshot.read_object(weights_file(power_average(width))))
    return weights


def _card(config: AverageConfig, checkpoint: CheckpointManifest, step: int) -> ModelCard:
    return checkpoint.card.model_copy(update={"steps": step, "ema_std": config.std, "weights": {}})


def _described(coefficients: Coefficients, error: float) -> bytes:
    """The coefficients for people, as JSON."""
    rows = [{"step": step, "std": width, "coefficient": count} for (step, width), count in coefficients.items()]
    return json.dumps({"profile_error": error, "snapshots": rows}, indent=1).encode()


DEFINITION = StageDefinition(
    AverageConfig, AverageManifest, VERSION, run, estimate=estimate, check=check, parents=parents
)
