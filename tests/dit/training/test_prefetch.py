import threading
import time

import pytest
import torch
from until import LIMIT

from dit.training.data import Batch
from dit.training.prefetch import DEPTH, prefetched


def batch(step: int) -> Batch:
    x0 = torch.full((1, 1, 1, 1), float(step))
    return Batch(x0, x0, torch.zeros(1), None)


def test_batches_come_in_order_from_any_step_on() -> None:
    with prefetched(batch, range(5, 12)) as batches:
        assert [batches(step).x0.item() for step in range(5, 12)] == list(range(5, 12))


def test_so_many_are_made_before_they_are_asked_for_and_no_more() -> None:
    begun, enough = list[int](), threading.Event()

    def noted(step: int) -> Batch:
        begun.append(step)
        if len(begun) == 1 + DEPTH:
            enough.set()
        return batch(step)

    with prefetched(noted, range(100)) as batches:
        batches(0)
        assert enough.wait(LIMIT)
        batches._pool.submit(int).result()  # by now it would have begun another
        assert begun == list(range(1 + DEPTH))


def test_waiting_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [0.0], threading.Event()

    def now() -> float:
        seconds = clock[0]
        asked.set()
        return seconds

    def slow(step: int) -> Batch:
        assert asked.wait(LIMIT)
        clock[0] += 5
        return batch(step)

    monkeypatch.setattr(time, "perf_counter", now)
    with prefetched(slow, range(1)) as batches:
        batches(0)
    assert batches.waited == 5


def test_what_making_raises_comes_with_its_own_step_and_leaving_waits_for_nobody() -> None:
    def broken(step: int) -> Batch:
        if step == 2:
            raise OSError("cannot be read")
        return batch(step)

    with prefetched(broken, range(10)) as batches:
        batches(0)
        batches(1)
        with pytest.raises(OSError, match="cannot be read"):
            batches(2)
    assert not [thread for thread in batches._pool._threads if thread.is_alive()]
