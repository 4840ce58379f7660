"""One check that fails, hangs or kills its process does not stop the others."""

import os
from pathlib import Path

import pytest

from flows.doctor.examine import examine
from flows.doctor.table import Asked, Check
from flows.launch.spec import LocalLaunch

ASKED = Asked("root", LocalLaunch(), named=False)


@pytest.fixture(autouse=True)
def checks_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))


def check(name: str, limit: float = 1000) -> Check:
    return Check(name, "a test", f"broken:{name}", limit=limit)


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("killed", "its process ended by SIGKILL"),
        ("raises", "RuntimeError: a library's error at http://host"),
        ("explains", "what it is; what to do"),
    ],
)
def test_the_others_run(name: str, seen: str) -> None:
    first, bad, last = examine(ASKED, [check("well"), check(name), Check("again", "", "broken:well", limit=1000)])
    assert [first.finding.state, bad.finding.state, last.finding.state] == ["ok", "failed", "ok"]
    assert bad.finding.seen.startswith(seen)
    same_process = first.finding.seen == last.finding.seen
    assert same_process is (name == "explains"), "an unexpected error leaves no process to trust"


def test_a_check_that_hangs_is_ended_by_its_limit() -> None:
    hung, after = examine(ASKED, [check("hangs", limit=20), check("well")])
    assert hung.finding.state == "failed"
    assert hung.finding.seen == "no answer within 20 s"
    assert after.finding.state == "ok"


def test_what_a_failing_check_printed_is_kept() -> None:
    (result,) = examine(ASKED, [check("raises")])
    assert "Traceback" in result.printed
    assert "with details" in result.printed


def test_a_check_that_is_not_there_is_one_failure() -> None:
    (result,) = examine(ASKED, [Check("gone", "", "broken:gone", limit=1000)])
    assert result.finding.state == "failed"
    assert "gone" in result.finding.seen
