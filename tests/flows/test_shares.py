import pytest
from machine import give_cores

from flows.shares import shares


def test_gpus_are_divided_as_far_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in shares(2)] == ["4,6", "5"]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in shares(4)] == ["4", "5", "6", "4"]
    assert shares(1) == [{"CUDA_VISIBLE_DEVICES": "4,5,6"}]


def test_gpus_behind_a_name_that_is_none_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert shares(2) == [{}, {}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,-1,1")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in shares(2)] == ["0", "0"]


def test_cores_are_divided_unless_somebody_has_said_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    give_cores(monkeypatch, 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert shares(2) == [{}, {}]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert shares(1) == [{}]
    assert shares(3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert shares(99)[0] == {"OMP_NUM_THREADS": "1"}
    assert shares(2, ranks=2) == [{"OMP_NUM_THREADS": "1"}] * 2
