"""What living processes need is told, and nothing is deleted under their hands."""

import errno
import os
import signal
import socket
from pathlib import Path
from threading import Thread

import pytest
from faults import start
from until import until

from flows import claims, processes
from storage import uri
from storage.errors import DitflowError, StorageError

KEY = "train/0123456789abcdef"
CLAIMS = """
import sys, time
from flows.claims import claim
claim(sys.argv[1], ["train/0123456789abcdef"])
print("claimed", flush=True)
time.sleep(600)
"""
DELETES = """
import sys, time
from flows.claims import deleting
with deleting(sys.argv[1]):
    print("deleting", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}"


def test_a_process_needs_what_it_claims_until_it_is_killed(tmp_path: Path) -> None:
    process = start(CLAIMS, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    assert list(claims.claimed(str(tmp_path))) == [KEY]
    process.kill()
    process.communicate()
    assert claims.claimed(str(tmp_path)) == {}


def test_a_claim_ends_with_its_process(root: str) -> None:
    claims.claim(root, [KEY])
    name = processes.join(root)
    listed = Path(processes.local_home(root), processes.FOLDER, name)
    assert KEY in listed.read_text().split()
    processes.leave(root)
    assert not listed.exists()
    assert not uri.exists(processes.shared(root, name))


def test_what_a_killed_process_needed_in_a_remote_root_is_forgotten_by_a_command_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    root = f"memory://{tmp_path.name}/the lab's"
    claims.claim(root, [KEY])
    listed = processes.shared(root, processes.join(root))
    processes.leave(root, told=False)  # as a kill does
    ((path, runs),) = processes.others("runs").killed.items()
    assert not runs

    def refuse(url: str, _: str) -> None:
        raise StorageError(f"{url}: cannot be removed")

    with monkeypatch.context() as patch:
        patch.setattr(uri, "remove_tree", refuse)
        processes.forget("runs", path)
    assert f"{listed}: cannot be removed; until a later command has done that" in caplog.text
    assert list(processes.others("runs").killed) == [path]
    assert uri.exists(listed)
    processes.forget("runs", path)
    assert not path.exists()
    assert not uri.exists(listed)


def test_a_process_of_two_remote_roots_ends_in_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    roots = [f"memory://{tmp_path.name}/{name}" for name in "ab"]
    for root in roots:
        claims.claim(root, [KEY])
    listed = [processes.shared(root, processes.join(root)) for root in roots]
    assert all(map(uri.exists, listed))
    processes.leave(roots[0])
    assert not any(map(uri.exists, listed))


def test_other_machines_see_what_is_needed_in_a_remote_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"memory://{tmp_path.name}"
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    claims.claim(root, [KEY])
    name = processes.join(root)
    monkeypatch.chdir(tmp_path / "here")
    assert claims.claimed(root) == {KEY: name}
    monkeypatch.chdir(tmp_path / "there")
    processes.leave(root)
    monkeypatch.chdir(tmp_path / "here")
    assert claims.claimed(root) == {}


def test_a_process_of_another_machine_counts_as_living(tmp_path: Path) -> None:
    folder = tmp_path / processes.FOLDER
    folder.mkdir()
    (folder / "0123@elsewhere").write_text(f"{KEY}\n")
    assert claims.claimed(str(tmp_path)) == {KEY: "0123@elsewhere"}


@pytest.mark.skipif(os.getuid() == 0, reason="root reads every file")
def test_a_list_that_cannot_be_read_stops_deletion(tmp_path: Path) -> None:
    folder = tmp_path / processes.FOLDER
    folder.mkdir()
    (folder / "0123@elsewhere").touch(mode=0)
    with pytest.raises(DitflowError, match="cannot be read, so nobody knows what this process needs"):
        claims.claimed(str(tmp_path))


def test_who_may_not_lock_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the folder, or the file in it, of another user whose umask is 077."""

    def refused(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    said = r"running/@gc: cannot be locked \(Permission denied\); ask its owner"
    with pytest.raises(DitflowError, match=said), claims.deleting(str(tmp_path)):
        pass
    claims.wait(str(tmp_path))
    assert "running/@gc: cannot be read (Permission denied); delete nothing while a flow runs" in caplog.text


def test_who_claims_waits_until_a_deletion_has_ended_or_was_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deleting = start(DELETES, tmp_path)
    assert deleting.stdout is not None
    assert deleting.stdout.readline() == "deleting\n"
    claiming = Thread(target=claims.claim, args=(str(tmp_path), [KEY]))
    claiming.start()
    until(lambda: "waiting for `ditflow gc`" in caplog.text)
    assert claiming.is_alive()
    deleting.send_signal(signal.SIGKILL)
    deleting.communicate()
    claiming.join()
    processes.leave(str(tmp_path))


def test_who_claims_in_a_remote_root_waits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = f"memory://{tmp_path.name}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.02)
    marker = processes.shared(root, claims.DELETING)
    uri.write(marker, b"elsewhere 1\n")
    claiming = Thread(target=claims.claim, args=(root, [KEY]))
    claiming.start()
    until(lambda: f"waiting for `ditflow gc`; delete {marker} if it was killed" in caplog.text)
    assert claiming.is_alive()
    uri.remove_tree(marker, root)
    claiming.join()
    processes.leave(root)


def test_one_deletes_at_a_time_in_a_remote_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"memory://{tmp_path.name}"
    monkeypatch.chdir(tmp_path)
    marker = processes.shared(root, claims.DELETING)
    uri.write(marker, b"elsewhere 1\n")
    with pytest.raises(DitflowError, match="process 1 on elsewhere is deleting, or was killed"), claims.deleting(root):
        pass
    uri.write(marker, f"{socket.gethostname()} {2**22 + 1}\n".encode())  # no process has such a number
    with claims.deleting(root):
        assert uri.exists(marker)
    assert not uri.exists(marker)
