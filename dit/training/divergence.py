"""What ends a run whose loss or gradient is not finite. A single such step is only skipped (`dit.training.loop`)."""

import math

from dit.training.data import Batches
from dit.training.loop import StepResult
from storage.errors import DitflowError


class DivergedError(DitflowError):
    """Too many steps in a row were skipped."""


def skipped_in_a_row(result: StepResult, batches: Batches, limit: int) -> int:
    """Steps in a row that were skipped, up to this one.

    Raises:
        DivergedError: they are ``limit`` or more.
    """
    count = int(result.skipped_in_a_row)
    if count < limit:
        return count
    first = result.step - count
    items = batches.items(first)
    named = ", ".join(map(str, items[:8])) + (", ..." if len(items) > 8 else "")
    steps = f"training diverged: {count:,} steps from step {first + 1:,} on had no finite loss or gradient"
    which = f"the first of them used images {named} of the store"
    remedy = "lower train.learning_rate, check these images, or set train.verify=every_start to see if bits flipped"
    raise DivergedError(f"{steps}; {which}; {remedy}")


def check_compilation(eager_loss: float) -> None:
    """Raise if the first loss, not finite in a compiled model, is finite without compilation.

    Raises:
        DitflowError: it is finite, so the compiled run can only diverge.
    """
    if math.isfinite(eager_loss):
        compiled = "train.compile: the first loss of the compiled model is not finite"
        eager = f"without compilation it is {eager_loss:.4g}"
        raise DitflowError(f"{compiled}, {eager}; set train.compile=false on this machine")
