"""The command: lines for people, JSON, exit codes."""

import json
from pathlib import Path

import pytest
from command_line import refused

from flows.command.main import main
from flows.doctor.table import CHECKS

FILES = ["--only", "packages", "--only", "machine", "--only", "root", "--only", "clock"]


def test_every_check_is_there_and_has_a_name_of_its_own() -> None:
    from pkgutil import resolve_name

    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(callable(resolve_name(check.function)) for check in CHECKS)


def test_each_check_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--root", str(tmp_path), "--only", "gpus", *FILES]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [line.split()[1] for line in lines[:-1]] == ["packages", "machine", "root", "clock", "gpus"]
    assert lines[-1].startswith("0 failed")


def test_json_has_an_object_for_each_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--root", str(tmp_path), "--json", *FILES]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["check"] for each in found] == ["packages", "machine", "root", "clock"]
    assert all(each.keys() >= {"state", "seen", "to_do", "seconds"} for each in found)


def test_a_bad_root_fails_and_the_other_checks_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "root").write_text("no folder")
    assert main(["doctor", "--root", str(tmp_path / "root"), "--json", *FILES]) == 1
    shown = capsys.readouterr()
    states = {each["check"]: each["state"] for each in map(json.loads, shown.out.splitlines())}
    assert (states["root"], states["clock"]) == ("failed", "failed")
    assert states["machine"] in ("ok", "warning")
    assert shown.err == "fault: root, clock failed\n"


@pytest.mark.parametrize(
    ("launch", "word"),
    [("{kind: slurm}", "in the job itself"), ("{nproc: x}", "nproc"), ("{kind: nodes}", "address"), ("[", "--launch")],
)
def test_a_launch_that_it_cannot_be_is_refused(launch: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert word in refused(capsys, ["doctor", "--launch", launch])
