"""Outputs of shorter runs that a run commits on its way.

A run passes through the last step of every shorter run that differs in nothing else (see `dit.training.shorter`). A
milestone is the output of that run: it has its digest, its folder and its bits, so whatever takes a trained model takes
a milestone.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from dit.training.throughput import LoggedStep

Copy = Callable[[int, Sequence[LoggedStep]], Callable[[], object]]
"""Copies the state of a step, with what was logged up to it, and returns the function that commits the copy."""


def milestone_steps(milestones: int | Sequence[int] | None, steps: int) -> list[int]:
    """The steps of the milestones of a run of so many ``steps``, in rising order.

    The last step is none, since it is the run's own. ``milestones`` is their distance or the steps themselves.
    """
    if isinstance(milestones, int):
        return list(range(milestones, steps, milestones))
    return sorted({step for step in milestones or () if step < steps})


class Milestones:
    """Commits milestones in a thread, one at a time, while training goes on. All ranks call the same methods.

    Args:
        steps: the steps whose milestones are missing.
        copy: copies the state on all ranks; what it returns on the first commits the copy.
        first: whether this is the first rank.
    """

    def __init__(self, steps: Sequence[int], copy: Copy, *, first: bool) -> None:
        self._steps, self._copy, self._first = frozenset(steps), copy, first
        self._thread = ThreadPoolExecutor(1)
        self._running: tuple[int, Future[object]] | None = None

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def begin(self, step: int, history: Sequence[LoggedStep]) -> None:
        """Wait for the milestone before, then copy the state and begin to commit it.

        Raises:
            StorageError: the milestone before could not be written.
        """
        self.wait()
        commit = self._copy(step, tuple(history))
        if self._first:
            self._running = step, self._thread.submit(commit)

    def check(self) -> None:
        """Raise the error of a milestone that could not be written. Does not wait."""
        if self._running is not None and self._running[1].done():
            self.wait()

    def wait(self, *, before: int | None = None) -> None:
        """Wait until the milestone is committed.

        Args:
            before: wait only for one of an earlier step. A run that resumes at this step makes its own again.

        Raises:
            StorageError: it could not be written.
        """
        if self._running is not None and (before is None or self._running[0] < before):
            (_, running), self._running = self._running, None
            running.result()

    def close(self) -> None:
        """Wait until nothing is being written. Errors are left to `wait`."""
        self._thread.shutdown()
