"""Temporary folders go with the command, however it ends, and never while somebody uses them."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import gone, start
from until import until

from flows import temporary
from storage.errors import InputError

PREFIX = f"{temporary.PREFIX}{socket.gethostname()}-"
COMMAND = """
import subprocess, sys, tempfile, time
from flows import temporary
CHILD = "from flows import temporary; temporary.hold(); print('held', flush=True); input()"
with temporary.of_command():
    tempfile.mkstemp()
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    print(tempfile.gettempdir(), child.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, of this process and its children."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path


def killed(script: str) -> tuple[Path, int]:
    """The folder that a killed command left, and a child of it that lives on."""
    with start(script) as command:
        assert command.stdout is not None
        folder, child = command.stdout.readline().split()
        command.kill()
    return Path(folder), int(child)


def test_all_that_is_temporary_goes_with_the_block(place: Path) -> None:
    with temporary.of_command():
        inside = Path(tempfile.mkdtemp())
        code = "import tempfile; print(tempfile.mkdtemp())"
        made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        assert Path(made).parent == inside.parent != place
        assert temporary.outside() == str(place)
        assert place not in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parents
    assert list(place.iterdir()) == []
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(place)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_what_a_killed_command_left_is_removed_when_its_children_have_ended(place: Path) -> None:
    folder, child = killed(COMMAND)
    with temporary.of_command():
        assert folder.exists()
    os.kill(child, signal.SIGKILL)
    until(lambda: gone(child))
    with temporary.of_command():
        assert not folder.exists()
    assert list(place.iterdir()) == []


def test_nothing_behind_a_link_is_removed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    mine = tmp_path_factory.mktemp("mine")
    (mine / "file").touch()
    (place / f"{PREFIX}link").symlink_to(mine)
    (place / f"{PREFIX}file").touch()
    (place / f"{PREFIX}abandoned").mkdir()
    (place / f"{PREFIX}abandoned" / "link").symlink_to(mine)
    (place / "other").mkdir()
    with temporary.of_command():
        pass
    assert (mine / "file").exists()
    assert {path.name.removeprefix(PREFIX) for path in place.iterdir()} == {"link", "file", "other"}


def test_a_folder_of_another_machine_stays(place: Path) -> None:
    (place / f"{temporary.PREFIX}another-x").mkdir()
    with temporary.of_command():
        pass
    assert [path.name for path in place.iterdir()] == [f"{temporary.PREFIX}another-x"]


def test_commands_at_once_leave_each_other_alone(place: Path) -> None:
    script = """
import tempfile
from flows import temporary
for _ in range(200):
    with temporary.of_command():
        tempfile.mkstemp()
"""
    running = [start(script) for _ in range(4)]
    assert [each.wait() for each in running] == [0] * 4
    assert list(place.iterdir()) == []


def test_no_folder_for_temporary_files_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place / "gone"))
    with pytest.raises(InputError, match="temporary files cannot be written .*; set TMPDIR"), temporary.of_command():
        pass
