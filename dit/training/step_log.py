"""What is logged of a step: to the tracker, and in a history, which checkpoints keep and curves are drawn from."""

import math
from dataclasses import dataclass

from dit.training.config import TrainConfig
from dit.training.held_out import HeldOut
from dit.training.loop import StepResult, TrainState
from dit.training.start import learning_rate
from dit.training.throughput import LoggedStep, ThroughputMeter
from storage.tracker import Tracker


@dataclass(frozen=True)
class StepLog:
    """Logs steps. All ranks have one and call the same methods."""

    config: TrainConfig
    history: list[LoggedStep]
    """What has been logged, to which steps are added."""
    held_out: HeldOut | None
    """Measures the loss on held-out images."""
    meter: ThroughputMeter
    tracker: Tracker

    def due(self, step: int) -> bool:
        """Whether a step is to be logged."""
        return step % self.config.log_every == 0 or step == self.config.steps or self._measures(step)

    def make_up(self, state: TrainState) -> None:
        """Measure the loss on held-out images of the step that training goes on from, if that is still to be done."""
        last = self.history[-1] if self.history else None
        if last is None or last.step != state.step or last.conditions or not self._measures(state.step):
            return
        held_out, conditions = self._measured(state, 0.0)
        self.history[-1] = last.model_copy(update={"held_out": held_out, "conditions": conditions})
        self.tracker.metrics(last.values | held_out, step=state.step)

    def write(self, state: TrainState, result: StepResult, waited: float, *, measure: bool) -> None:
        """Send a step to the tracker, and add it to the history unless it was skipped.

        Args:
            state: the state after the step.
            result: what the step measured.
            waited: seconds that steps have waited for their batches, since training began.
            measure: whether there is time for the loss on held-out images, if it is due. Otherwise the tracker hears
                of the step when `make_up` has measured it.
        """
        values = {name: term.item() for name, term in result.terms.items()}
        values |= {"gradient_norm": result.gradient_norm.item()}
        rates = self.meter.measure(result.step, waited)
        waits = self._measures(result.step) and not measure
        held_out, conditions = ({}, "") if waits else self._measured(state, waited)
        if not result.skipped_in_a_row:
            logged = LoggedStep(step=result.step, values=values, held_out=held_out, conditions=conditions)
            self.history.append(logged)
        values |= {f"loss_quartile_{number}": loss for number, loss in enumerate(result.quartiles.tolist(), start=1)}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        others = {"learning_rate": learning_rate(self.config, result.step - 1), "skipped_steps": float(result.skipped)}
        if not waits:  # the tracker takes a step once
            self.tracker.metrics(finite | held_out | others | rates, step=result.step)
        self.tracker.progress(result.step, self.config.steps, "steps")

    def _measures(self, step: int) -> bool:
        return self.held_out is not None and self.held_out.due(step, self.config.steps)

    def _measured(self, state: TrainState, waited: float) -> tuple[dict[str, float], str]:
        """The loss on held-out images if it is due, and the digest of its conditions."""
        if self.held_out is None or not self._measures(state.step):
            return {}, ""
        values = self.held_out.measure(state)
        self.meter.begin(state.step, waited)  # the rates are those of training
        return values, self.held_out.conditions_digest
