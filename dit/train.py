"""Latents to a checkpoint."""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing

import torch
from pydantic import ValidationError
from torch import nn

from dit.devices import arithmetic, device, dtype
from dit.diffusion.build import build_process
from dit.diffusion.config import DiffusionConfig
from dit.export import RAW_WEIGHTS, CheckpointManifest, ModelCard, export, weights_file
from dit.latent_scale import channel_scale
from dit.models.choice import DataSpec
from dit.models.config import ModelConfig
from dit.models.cost import activations, cost
from dit.models.lora import Lora, merged
from dit.ranks import Ranks, joined
from dit.rates import at_once, training_rate
from dit.training import origin
from dit.training.config import TrainConfig
from dit.training.data import Batches, Data
from dit.training.divergence import DivergedError, check_compilation, skipped_in_a_row
from dit.training.held_out import REPORT, HeldOut, bytes_to_copy, check_held_out, open_held_out, passes
from dit.training.loop import TrainState, eager_loss, train
from dit.training.milestones import Milestones, milestone_steps
from dit.training.parallelize import gathered
from dit.training.per_block import choose_attention, recompute_blocks
from dit.training.preemption import preemption
from dit.training.prefetch import prefetched
from dit.training.sample_grid import SampleGrid
from dit.training.shorter import newest_step, shorter_runs, warn_of_other_batch_sizes
from dit.training.start import autocast, check_start, decays, initial_state, open_for, prepared, step_config
from dit.training.step_log import StepLog
from dit.training.throughput import LoggedStep, ThroughputMeter
from storage.config import problem
from storage.errors import InputError, PreemptedError
from storage.estimate import PlanContext, StageCost
from storage.latents import LatentManifest
from storage.manifest import StageOutput, is_finished
from storage.stage import StageDefinition
from storage.tracker import NullTracker, Tracker, publish

VERSION = 3
LOGGER = logging.getLogger(__name__)


def run(config: TrainConfig, latents: LatentManifest, *, out: StageOutput, tracker: Tracker) -> CheckpointManifest:
    """Train from the newest checkpoint to the last step on all ranks, and commit the model.

    Raises:
        InputError: model, latents and ranks do not fit each other.
        StorageError: the latents are not what was committed, or the disk is full.
        DivergedError: loss or gradient is not finite for too many steps, also after a restart from a checkpoint.
        PreemptedError: SIGTERM arrived; the state is saved.
    """
    with joined() as ranks, arithmetic(config.precision):
        card = card_for(config, latents)
        held_out = open_held_out(config, card, latents, ranks)
        batches = batches_of(config, card, latents, ranks)
        trained = None
        try:
            trained = _train(config, card, batches, held_out, ranks, out, tracker)
        except DivergedError as error:
            LOGGER.warning("%s; restarting from the last checkpoint", error)
        # A transient fault does not return. The restart is outside the except block: the error holds the old state.
        state, history = trained or _train(config, card, batches, held_out, ranks, out, tracker)
        weights = weights_of(state, config.lora, ranks)
        ranks.finish()
        if ranks.first:
            _commit(config, card, weights, history, held_out, out, tracker)
        ranks.wait()
        return CheckpointManifest.read(out.uri)


def weights_of(state: TrainState, lora: Lora | None, ranks: Ranks) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of all weights in the first rank's host memory, by the name of their file. All ranks must call this.

    Adapters are merged into them.
    """
    parts = {name: average.weights() for name, average in state.averages.items()}
    parts |= {"raw": state.model.state_dict()}
    return {weights_file(name): merged(gathered(tensors, ranks), lora) for name, tensors in parts.items()}


def model_for(config: TrainConfig, latents: LatentManifest) -> ModelConfig:
    """The full config of the model to train on these latents.

    Raises:
        InputError: model and latents do not fit each other.
    """
    channels, side, _ = latents.latent_shape
    classes, learn_variance = len(latents.class_names), isinstance(config.diffusion, DiffusionConfig)
    try:
        return config.model.config(DataSpec(channels, side, classes, learn_variance, config.augmentation > 0))
    except ValidationError as error:
        raise InputError(f"train.model: does not fit the latents: {problem(error)}") from error


def card_for(config: TrainConfig, latents: LatentManifest) -> ModelCard:
    """The model card, without hashes of weights.

    Raises:
        InputError: as `model_for`, or the latents cannot be normalised.
    """
    return ModelCard(
        model=model_for(config, latents),
        diffusion=config.diffusion,
        vae=latents.vae,
        channels=channel_scale(config.normalise, latents, flips=config.flips),
        resolution=latents.resolution,
        class_names=latents.class_names,
        steps=config.steps,
        lora=config.lora,
    )


def check(config: TrainConfig, latents: LatentManifest, plan: PlanContext) -> None:
    """Check what would stop training.

    Raises:
        InputError: config, latents and what training starts from do not fit each other.
    """
    _check(config, latents, plan.world_size)
    if config.held_out:
        check_held_out(latents)
    check_start(config, card_for(config, latents))


def _check(config: TrainConfig, latents: LatentManifest, ranks: int) -> None:
    """Check that the config fits the latents and the number of ranks."""
    if config.batch_size % ranks:
        raise InputError(f"train.batch_size: {config.batch_size} is not a multiple of the {ranks} ranks")
    if config.flips and latents.vae and latents.flips == 1:
        raise InputError("train.flips: the latents have no mirror images; set encode.flips=true or train.flips=false")
    if config.augmentation and latents.vae:
        raise InputError("train.augmentation: works on pixels, and the data are latents; set it to 0")
    if config.dispersive:
        pushed = config.dispersive.output(model_for(config, latents), prepared(config))
        if not pushed.requires_grad:
            reason = f"nothing up to block {config.dispersive.block} is trained, so it changes nothing"
            raise InputError(f"train.dispersive: {reason}; remove it, or freeze less")


def batches_of(
    config: TrainConfig, card: ModelCard, latents: LatentManifest, ranks: Ranks, data: Data | None = None
) -> Batches:
    """The batches of a run, which depend on the config and the step alone.

    Args:
        config: of the training.
        card: of the model.
        latents: what is known of the images.
        ranks: that share the batches.
        data: the images. None: those of the store that ``latents`` is the manifest of.

    Raises:
        InputError: config, latents and ranks do not fit each other.
        StorageError: the latents are not what was committed.
    """
    _check(config, latents, ranks.world_size)
    model = card.model
    return Batches(
        data=data or open_for(config, card, latents, ranks),
        shape=latents.latent_shape,
        batch_size=config.batch_size,
        seed=config.seed,
        flips=config.flips,
        num_classes=model.num_classes,
        label_dropout=model.label_dropout,
        ranks=ranks,
        device=device(),
        augmentation=config.augmentation,
        order=config.order,
        streamed=config.reading == "streamed",
        dropout=model.uses_dropout,
    )


def _train(
    config: TrainConfig,
    card: ModelCard,
    batches: Batches,
    held_out: HeldOut | None,
    ranks: Ranks,
    out: StageOutput,
    tracker: Tracker,
) -> tuple[TrainState, list[LoggedStep]]:
    """Train from the newest checkpoint to the last step, log and save; return the state and what was logged."""
    from dit.training import checkpoint  # imports torch.distributed.checkpoint, which takes seconds

    state = initial_state(config, card, ranks)
    history = _resume(config, state, held_out, ranks, out, tracker)
    process = build_process(config.diffusion, batches.device)
    how = step_config(config)
    saver = checkpoint.Saver(out, state, ranks, keep=config.keep_checkpoints, keep_every=config.keep_every)
    milestones = _milestones(config, card, state, held_out, ranks, out)
    grid = SampleGrid(card, config.precision)
    meter = ThroughputMeter(card.model, config.batch_size, ranks.world_size, batches.device, dtype(config.precision))
    log = StepLog(config, history, held_out, meter, tracker)
    steps = range(state.step, config.steps)
    with preemption(ranks) as stop, closing(saver), closing(milestones), prefetched(batches, steps) as next_batch:
        meter.begin(state.step)
        log.make_up(state)
        if config.sample_every and state.step and state.step % config.sample_every == 0:
            _sample(grid, state, config.lora, ranks, tracker)  # again, unless SIGTERM came before
        if state.step in milestones and history:  # a signal came between its checkpoint and its commit
            milestones.begin(state.step, history)
        for result in train(state, process, next_batch, how, stop=config.steps, ranks=ranks):
            saver.check()
            milestones.check()
            if config.compile and result.step == steps.start + 1 and not result.terms["loss"].isfinite():
                check_compilation(eager_loss(state.model, process, result.batch, how, ranks))
            last = result.step == config.steps
            stops = stop.requested() and not last
            logs = log.due(result.step) or result.step in milestones
            saves = result.step % config.checkpoint_every == 0 or last or stops
            if logs or saves or result.step % config.max_skipped == 0:
                skipped = skipped_in_a_row(result, batches, config.max_skipped)
            if logs:
                log.write(state, result, next_batch.waited, measure=not stops)
            if config.sample_every and result.step % config.sample_every == 0 and not stops:
                _sample(grid, state, config.lora, ranks, tracker)
            if result.step in milestones and history and not stops:
                milestones.begin(result.step, history)
            if saves and skipped == 0:  # a checkpoint amid skipped steps would lead a restarted run back to them
                milestones.wait(before=result.step)  # a run that resumes from this checkpoint does not pass it again
                saver.save(history)
            if stops:
                saver.wait()
                milestones.wait()
                ranks.wait()  # torchrun would end the saving rank as soon as another one left
                raise PreemptedError(f"stopped by SIGTERM at step {result.step:,}; run the same command to continue")
        saver.wait()
        milestones.wait()
    if not history:
        raise DivergedError("training diverged: no logged loss is finite; lower train.learning_rate")
    return state, history


def _milestones(
    config: TrainConfig,
    card: ModelCard,
    state: TrainState,
    held_out: HeldOut | None,
    ranks: Ranks,
    out: StageOutput,
) -> Milestones:
    """What commits the milestones that are still missing."""

    def output(step: int) -> tuple[TrainConfig, StageOutput]:
        shorter = config.model_copy(update={"steps": step, "milestones": None})
        return shorter, out.with_config(shorter)

    def copy(step: int, history: Sequence[LoggedStep]) -> Callable[[], object]:
        shorter, place = output(step)
        its_card, weights = card.model_copy(update={"steps": step}), weights_of(state, config.lora, ranks)

        def commit() -> None:
            place.begin()
            _commit(shorter, its_card, weights, history, held_out, place, NullTracker())

        return commit

    steps = milestone_steps(config.milestones, config.steps)
    missing = ranks.agreed([step for step in steps if ranks.first and not is_finished(output(step)[1].uri)])
    passed = [step for step in missing if step < state.step]
    if passed and ranks.first:
        LOGGER.warning("milestones before step %d, where this run begins, are not made: %s", state.step, passed)
    return Milestones(missing, copy, first=ranks.first)


def _sample(grid: SampleGrid, state: TrainState, lora: Lora | None, ranks: Ranks, tracker: Tracker) -> None:
    """Draw samples with the EMA. All ranks must call this; the first draws, and the others go on to their next step."""
    weights = merged(gathered(state.averages["ema"].weights(), ranks), lora)
    picture = grid.draw(weights) if ranks.first else None
    if picture is not None:
        tracker.artifact(f"samples-{state.step:09d}.png", picture)


def _resume(
    config: TrainConfig,
    state: TrainState,
    held_out: HeldOut | None,
    ranks: Ranks,
    out: StageOutput,
    tracker: Tracker,
) -> list[LoggedStep]:
    """Restore the newest checkpoint, also of a run with fewer steps; return what was logged up to it."""
    from dit.training import checkpoint

    shorter = ranks.agreed(shorter_runs(out, config, decay=config.decay) if ranks.first else [])
    history = checkpoint.load_newest([out, *shorter], state, ranks)
    ranks.wait()
    if ranks.first:
        checkpoint.clean(out, state.step)
        checkpoint.prune(out, state.step, keep=config.keep_checkpoints, keep_every=config.keep_every)
        if state.step:
            LOGGER.info("resuming after step %d", state.step)
        else:
            warn_of_other_batch_sizes(out, config)
        measured = {point.step: point.held_out for point in held_out.points(history)} if held_out else {}
        for logged in history if newest_step(out) < state.step else ():  # a shorter run's: this curve has them, too
            tracker.metrics(logged.values | measured.get(logged.step, {}), step=logged.step)
    return history


def _commit(
    config: TrainConfig,
    card: ModelCard,
    weights: dict[str, dict[str, torch.Tensor]],
    history: Sequence[LoggedStep],
    held_out: HeldOut | None,
    out: StageOutput,
    tracker: Tracker,
) -> None:
    from dit.report.plots import curve  # imports SciPy and Matplotlib, which take a second

    if is_finished(out.uri):  # by a run of other steps, at the same time; its curve may have other points
        return
    losses = [logged.values["loss"] for logged in history]
    measured = held_out.series(history) if held_out else {}
    pictures = [publish(out, tracker, "loss.png", curve([logged.step for logged in history], losses, measured))]
    if held_out:
        pictures.append(publish(out, tracker, REPORT, held_out.report(history)))
    card, files = export(out, card, weights)
    counts = {"steps": config.steps, "images_seen": config.steps * config.batch_size}
    counts["parameters"] = sum(tensor.numel() for tensor in weights[RAW_WEIGHTS].values())
    last = history[-1].values if history[-1].step == config.steps else {}  # else the last step was skipped
    metrics = {f"final_{name}": value for name, value in last.items()}
    out.commit(CheckpointManifest, [*files, *pictures], counts=counts, metrics=metrics, card=card)


def estimate(config: TrainConfig, latents: LatentManifest, plan: PlanContext) -> StageCost:
    """What it takes to train the model.

    Raises:
        InputError: model and latents do not fit each other.
    """
    card, ranks = card_for(config, latents), plan.world_size
    share = -(-config.batch_size // ranks)
    batch = min(share, config.micro_batch or share)
    work, images = cost(card.model, prepared(config)), config.steps * config.batch_size
    averages, saved = decays(config), min(config.keep_checkpoints, -(-config.steps // config.checkpoint_every))
    held = work.memory | {"ema": len(averages) * work.memory["ema"]}
    whole = held["gradients"] if batch < share else 0  # every rank accumulates all of them
    checkpoint, model = held["weights"] + held["adamw"] + held["ema"], (1 + len(averages)) * held["weights"]
    models = 1 + len(milestone_steps(config.milestones, config.steps))
    again = 2 * work.macs if config.dispersive and batch < share else 0  # a forward pass more, before the first part
    rate = plan.rate("train", lambda: training_rate(card.model, batch, config.precision))
    return StageCost(
        images=images,
        objects=2 * saved + (4 + len(averages)) * models,
        size=saved * checkpoint + models * model,
        units=config.steps,
        done=max(map(newest_step, [plan.out, *shorter_runs(plan.out, config, decay=config.decay)])),
        seconds=((images + passes(config, plan) / 3) * work.training_flops + images * again) / rate / at_once(ranks),
        leaves={"card": card.model_copy(update={"weights": dict.fromkeys(map(weights_file, ("raw", *averages)), "")})},
        unit="steps",
        memory=(sum(held.values()) - whole) // _parts(config, plan) + whole + _activations(config, card.model, batch),
        copied=None if config.reading == "streamed" else bytes_to_copy(config, latents, plan),
        save_memory="train.micro_batch, train.checkpoint_activations, train.parallel=fsdp or more ranks (launch)",
    )


def _parts(config: TrainConfig, plan: PlanContext) -> int:
    """Ranks among which what training holds is divided."""
    machines = plan.nodes if config.parallel == "hsdp" else 1
    return 1 if config.parallel == "ddp" else plan.world_size // machines


def _activations(config: TrainConfig, model: ModelConfig, batch: int) -> int:
    def prepare(network: nn.Module) -> None:
        prepared(config)(network)
        choose_attention(network, autocast(config))
        if config.checkpoint_activations:
            recompute_blocks(network)

    kept = activations(model, batch, autocast(config), prepare)
    return kept + (config.dispersive.memory(model, config.batch_size) if config.dispersive else 0)


DEFINITION = StageDefinition(
    TrainConfig,
    CheckpointManifest,
    VERSION,
    run,
    inputs=lambda config, _: origin.inputs(config.init),
    estimate=estimate,
    rates={"train": "FLOP of training steps in a second, on one rank"},
    check=check,
    parents=lambda config, _: origin.parents(config.init),
)
