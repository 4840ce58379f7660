import threading

import pytest

from storage.parallel import threads


def test_results_keep_their_order() -> None:
    with threads(0) as pool:
        assert list(pool.map(abs, [-3, 2, -1])) == [3, 2, 1]


def test_an_error_drops_what_has_not_begun() -> None:
    begun, go_on = list[int](), threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number:
            go_on.wait()

    def fail() -> None:
        with threads(1) as pool:
            futures = [pool.submit(work, number) for number in range(50)]
            futures[0].result()
            threading.Timer(0.1, go_on.set).start()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert len(begun) <= 2
