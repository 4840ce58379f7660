import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import give_cores
from until import until

from storage.parallel import ahead, cores, threads


def test_results_keep_their_order() -> None:
    with threads(0) as pool:
        assert list(pool.map(abs, [-3, 2, -1])) == [3, 2, 1]


def test_the_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    give_cores(monkeypatch, 2)
    assert cores() == 2
    with threads(0) as pool:
        assert pool._max_workers == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # not every system has it
    assert cores() == 128
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("250000 100000\n", 3),
        ("50000 100000\n", 1),
        ("6400000 100000\n", 8),
    ],
)
def test_a_container_has_a_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, expected: int
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    give_cores(monkeypatch, 8, share=tmp_path / "cpu.max")
    assert cores() == expected


def test_an_error_cancels_tasks_that_have_not_begun() -> None:
    begun, go_on = list[int](), threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number:
            go_on.wait()

    def fail() -> None:
        with threads(1) as pool:
            futures = [pool.submit(work, number) for number in range(50)]
            futures[0].result()
            release = threading.Thread(target=lambda: (until(futures[-1].cancelled), go_on.set()))
            release.start()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert len(begun) <= 2


class Counted:
    """Counts up, and remembers how far it has come and on which threads."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.threads: set[int] = set()
        self.closed = False

    def __call__(self, count: int, fail: bool = False) -> Iterator[int]:
        try:
            for number in range(count):
                self.made.append(number)
                self.threads.add(threading.get_ident())
                yield number
            if fail:
                raise RuntimeError("no more")
        finally:
            self.closed = True


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_ahead_keeps_the_order(depth: int) -> None:
    counted = Counted()
    assert list(ahead(counted(10), depth)) == list(range(10))
    assert counted.threads.isdisjoint({threading.get_ident()})
    assert len(counted.threads) == 1


def test_ahead_prepares_no_more_than_depth_items() -> None:
    counted, asked, early = Counted(), 0, list[int]()

    def noted() -> Iterator[int]:
        for number in counted(100):
            early.append(number) if number > asked + 2 else None
            yield number

    items = ahead(noted(), 3)
    for number in range(20):
        asked += 1
        assert next(items) == number
        until(lambda number=number: len(counted.made) >= number + 4)
    items.close()
    assert early == []
    assert len(counted.made) == 23


def test_an_error_ahead_comes_after_the_items_before_it() -> None:
    found = []
    with pytest.raises(RuntimeError, match="no more"):
        for number in ahead(Counted()(4, fail=True), 10):
            found.append(number)
    assert found == [0, 1, 2, 3]


def test_stopping_early_leaves_no_thread_behind() -> None:
    counted, before = Counted(), threading.active_count()
    for number in ahead(ahead(counted(100), 2), 2):
        if number == 5:
            break
    del number
    until(lambda: threading.active_count() <= before)
    assert counted.closed
