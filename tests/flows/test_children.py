"""Children end when they must, whatever happens to them or to us."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults import all_gone, descendants, gone, start
from until import until

from flows import children
from flows.children import child

STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(999)"
SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("up", flush=True)
time.sleep(600)
"""


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", script, *arguments]


def first_line(running: "subprocess.Popen[str]") -> str:
    assert running.stdout is not None
    return running.stdout.readline().rstrip("\n")


def test_output_and_errors_reach_the_pipe() -> None:
    script = "import os, sys; print(os.environ['GIVEN'], flush=True); sys.stderr.write('and this'); sys.exit(3)"
    with child(python(script), env={"GIVEN": "this"}) as running:
        assert running.stdout is not None
        assert running.stdout.read() == "this\nand this"
        assert running.wait() == 3
    assert running.returncode == 3


def test_output_goes_to_a_file(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, child(python("print('this')"), output=log) as running:
        assert running.wait() == 0
    assert (tmp_path / "log").read_text() == "this\n"


def test_bytes_that_are_no_text_do_not_stop_the_reader() -> None:
    with child(python("import os; os.write(1, b'\\xff!\\n')")) as running:
        assert first_line(running) == "�!"


def test_a_child_has_a_session_of_its_own() -> None:
    with child(python(STUBBORN.replace("signal.SIG_IGN", "signal.SIG_DFL"))) as running:
        assert first_line(running) == "up"
        assert os.getsid(running.pid) == running.pid != os.getsid(0)


def test_the_end_of_the_block_asks_the_child_to_end() -> None:
    with child(python(SAVES)) as running:
        assert first_line(running) == "up"
    assert running.returncode == 7


def test_an_exception_in_the_block_ends_the_child() -> None:
    with pytest.raises(KeyboardInterrupt), child(python("import time; print('up', flush=True); time.sleep(600)")) as it:
        assert first_line(it) == "up"
        raise KeyboardInterrupt
    assert it.returncode == -signal.SIGTERM


def test_sigterm_that_comes_again_leaves_the_child_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before the child was asked: the kernel repeats the signal while the threads of a killed parent end."""
    again = [True, True]

    def interrupted(process: "subprocess.Popen[str]") -> bool:
        if again:
            again.pop()
            signal.raise_signal(signal.SIGTERM)
        return False

    monkeypatch.setattr(children, "has_ended", interrupted)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit, match="143"), child(python(SAVES)) as running:
            assert first_line(running) == "up"
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (again, running.returncode) == ([], 7)


def test_a_child_that_says_much_at_its_end_is_heard_out() -> None:
    """Nobody reads the pipe any more, and it holds 64 KiB."""
    script = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    sys.stdout.write('x' * 1_000_000)\n"
        "    sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('up', flush=True); time.sleep(600)"
    )
    with child(python(script)) as running:
        assert first_line(running) == "up"
    assert running.returncode == 7


def test_a_child_that_ignores_sigterm_is_killed_with_all_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "GRACE_SECONDS", 0.3)
    script = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}])\n{STUBBORN}"
    with child(python(script)) as running:
        assert [first_line(running), first_line(running)] == ["up", "up"]
        (grandchild,) = descendants(running.pid)
    assert running.returncode == -signal.SIGKILL
    until(lambda: gone(grandchild))


def test_what_a_killed_child_leaves_is_ended_once_and_its_number_never_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[int] = []
    real = os.killpg
    script = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}])\n{STUBBORN}"
    with child(python(script)) as running:
        assert [first_line(running), first_line(running)] == ["up", "up"]
        (grandchild,) = descendants(running.pid)
        running.kill()
        monkeypatch.setattr(os, "killpg", lambda *given: (killed.append(given[0]), real(*given)))
        until(lambda: children.has_ended(running))
        until(lambda: gone(grandchild))
    assert killed == [running.pid]


def test_a_second_ctrl_c_does_not_leave_a_stubborn_child() -> None:
    script = f"""
import sys
from flows.children import child
with child([sys.executable, "-c", {STUBBORN!r}]) as running:
    print(running.stdout.readline().strip(), running.pid, flush=True)
    running.wait()
"""
    parent = start(script)
    pid = int(first_line(parent).split()[1])
    parent.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        parent.wait(1)  # it waits for the child, which ignores it
    parent.send_signal(signal.SIGINT)
    assert parent.wait(500) != 0
    assert gone(pid)


def test_a_killed_parent_takes_children_and_ranks_with_it() -> None:
    rank = "import os; from flows.children import set_parent_death_signal as arm; arm(os.getppid(), 9); " + STUBBORN
    agent = (
        "import signal, subprocess, sys; "
        f"subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True).wait()"
    )
    script = f"""
import sys
from flows.children import child
with child([sys.executable, "-c", {agent!r}]) as running:
    print(running.stdout.readline().strip(), flush=True)
    running.wait()
"""
    parent = start(script)
    assert first_line(parent) == "up"
    pids = descendants(parent.pid)
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    until(lambda: all_gone(pids))


def test_a_parent_that_died_before_the_kernel_was_told_counts() -> None:
    call = (
        "import sys; from flows.children import set_parent_death_signal as arm; arm(int(sys.argv[1])); print('lives')"
    )
    orphan = subprocess.run(python(call, "1"), capture_output=True, text=True, check=False)
    assert (orphan.returncode, orphan.stdout) == (-signal.SIGTERM, "")
    cared_for = subprocess.run(python(call, str(os.getpid())), capture_output=True, text=True, check=False)
    assert (cared_for.returncode, cared_for.stdout) == (0, "lives\n")
