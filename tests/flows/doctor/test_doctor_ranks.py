"""Real ranks under torchrun sum, or say why not."""

import pytest

from flows.doctor import ranks
from flows.launch.spec import LocalLaunch


def test_ranks_sum() -> None:
    found = ranks.check(LocalLaunch(nproc=0))
    assert found.state in ("ok", "warning"), found
    assert "rank" in found.seen


def test_ranks_that_fail_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-network")
    monkeypatch.setattr("flows.launch.start.sys.platform", "other")  # where ranks choose their network themselves
    found = ranks.check(LocalLaunch(nproc=2))
    assert found.state == "failed"
    assert "\n" not in found.seen
    assert "GLOO_SOCKET_IFNAME" in found.to_do
    assert "Traceback" in capsys.readouterr().out
