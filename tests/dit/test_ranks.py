import pytest
import tiny
from machine import give_cores

from dit.ranks import Ranks, Share, cores, joined


def test_a_share_stands_for_the_whole() -> None:
    recorder = tiny.Recorder()
    share = Share(recorder, before=100, todo=31)
    for done in (0, 5, 9, 10):  # of the 10 that this rank does
        share.progress(done, 10, "images")
    assert recorder.steps == [(100, 131, "images"), (116, 131, "images"), (128, 131, "images"), (131, 131, "images")]


def test_cores_are_divided_among_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    give_cores(monkeypatch, 12)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # somebody else's
    assert cores() == 12
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    for ranks, expected in ((8, 1), (5, 2), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert cores() == expected


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "3"), ("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)  # another launcher's
    with joined() as ranks:
        assert ranks == Ranks(0, 1)
        assert ranks.first
        assert ranks.agreed([1, 2]) == [1, 2]
        ranks.wait()
