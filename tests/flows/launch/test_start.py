"""A stage on ranks that torchrun starts: what comes back, and what is left when anything of it dies."""

import json
import os
import re
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults import all_gone, dead_address, descendants, gone, start
from launching import ENDLESS, LOG, TINY, Noted, job
from until import until

from flows.children import child
from flows.contract import STAGES
from flows.launch import start as launcher
from flows.launch.rank_log import MARK, LostRankError, RankLog, WorkerError
from flows.launch.spec import LocalLaunch
from flows.tracking.sink import UNSENT
from flows.tracking.spec import TrackingSpec
from storage import cost
from storage.errors import DitflowError, InputError, PreemptedError
from storage.latents import LatentManifest
from storage.manifest import StageOutput
from storage.tracker import NullTracker


def unsent(output: StageOutput) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(output.uri) / UNSENT).read_text().splitlines()]


def ranks() -> list[psutil.Process]:
    """The ranks that run below this process, in order."""
    found = {_rank(process): process for process in psutil.Process().children(recursive=True)}
    return [found[rank] for rank in sorted(found) if rank >= 0]


def _rank(process: psutil.Process) -> int:
    try:
        return int(process.environ().get("RANK", "-1"))
    except psutil.Error:  # it ended meanwhile
        return -1


@pytest.mark.full
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_stage_runs_and_reports(
    nproc: int,
    latents: LatentManifest,
    lines: pytest.LogCaptureFixture,
    nothing_left: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")  # so that every rank has something to say, if it has peers
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("raise AssertionError('a package of the user')")
    monkeypatch.chdir(tmp_path)
    noted, spec, addresses, before = Noted(), job(latents, TINY), set[str](), descendants()

    def progress(done: int, total: int, unit: str) -> None:
        noted(done, total, unit)
        for pid in set(descendants()) - set(before):
            with suppress(psutil.NoSuchProcess):
                connections = psutil.Process(pid).net_connections("inet")
                addresses.update(each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN)

    launcher.run(spec, LocalLaunch(nproc=nproc), progress=progress, log=LOG)
    assert addresses == ({"127.0.0.1"} if nproc > 1 else set())  # nobody else's machine can join
    assert not [*tmp_path.glob("torchelastic_*"), *tmp_path.glob("ditflow-*")]
    manifest = STAGES["train"].kind.read(spec.output.uri)
    assert manifest.counts["steps"] == 4
    done, total, unit = noted.progress[-1]
    assert (done, total) == (4, 4)
    assert unit.startswith("steps, loss ")
    assert not any(MARK in line for line in lines.messages)
    for rank in range(nproc) if nproc > 1 else ():
        assert any(line.startswith(f"[rank{rank}]") for line in lines.messages)
    losses = [record["value"] for record in unsent(spec.output) if record.get("metric") == "loss"]
    assert len(losses) == 4  # of one rank, though all of them measure
    assert losses[-1] == manifest.metrics["final_loss"]


def test_wrong_input_found_by_a_rank_is_the_users_own_line(
    latents: LatentManifest, lines: pytest.LogCaptureFixture, nothing_left: None
) -> None:
    wrong = TINY.model_copy(update={"flips": True})
    spec = job(latents, wrong)
    with pytest.raises(InputError) as here:
        STAGES["train"].run(wrong, latents, out=spec.output, tracker=NullTracker())
    with pytest.raises(InputError) as there:
        launcher.run(spec, LocalLaunch(nproc=2), progress=Noted(), log=LOG)
    assert str(there.value) == str(here.value)
    assert not any("flows/launch/worker.py" in line for line in lines.messages)  # no traceback for a person's slip


@pytest.mark.full
def test_a_rank_that_fails_leaves_its_traceback(
    latents: LatentManifest, lines: pytest.LogCaptureFixture, nothing_left: None
) -> None:
    damaged = Path(latents.uri) / next(entry.path for entry in latents.files if "/mean/c/" in entry.path)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(WorkerError, match=r"^rank 0 failed: StorageError: .*mean.*$") as failure:
        launcher.run(job(latents, TINY), LocalLaunch(nproc=1), progress=Noted(), log=LOG)
    assert "\n" not in str(failure.value)
    assert "[rank 0] Traceback (most recent call last):" in lines.messages
    assert any(line.startswith("[rank 0] storage.errors.StorageError: ") for line in lines.messages)


@pytest.mark.full
def test_a_killed_rank_fails_the_stage(latents: LatentManifest, nothing_left: None) -> None:
    killed: list[int] = []

    def kill_one(done: int, total: int, unit: str) -> None:
        if not killed:
            killed.extend(process.pid for process in ranks())
            os.kill(killed[1], signal.SIGKILL)

    with pytest.raises(WorkerError, match=r"^rank 1 was killed by SIGKILL, perhaps because memory ran out$"):
        launcher.run(job(latents, ENDLESS), LocalLaunch(nproc=2, max_restarts=0), progress=kill_one, log=LOG)
    assert len(killed) == 2
    assert all_gone(killed)


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (signal.SIGKILL, r"rank 1 was killed by SIGKILL, perhaps because memory ran out"),
        pytest.param(
            signal.SIGTERM,
            r"stopped by SIGTERM at step \d+; run the same command to continue",
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_stage_that_loses_a_rank_starts_again_from_its_checkpoint(
    number: signal.Signals, why: str, latents: LatentManifest, lines: pytest.LogCaptureFixture, nothing_left: None
) -> None:
    config = TINY.model_copy(update={"steps": 200, "checkpoint_every": 50})
    undisturbed, spec = job(latents, config), job(latents, config)
    STAGES["train"].run(config, latents, out=undisturbed.output, tracker=NullTracker())
    expected = STAGES["train"].kind.read(undisturbed.output.uri).metrics
    shutil.rmtree(undisturbed.output.uri)
    noted = list[int]()

    def kill_once(done: int, total: int, unit: str) -> None:
        if done == 125 and done not in noted:
            os.kill(ranks()[1].pid, number)
        noted.append(done)

    launcher.run(spec, LocalLaunch(nproc=2), progress=kill_once, log=LOG)
    assert any(re.fullmatch(rf"{why}; restarting all ranks \(1 of 3\)", line) for line in lines.messages)
    resumed = next(int(line.split()[-1]) for line in lines.messages if "resuming after step" in line)
    # When one is being saved, the one before it has been.
    assert resumed in (50, 100, 150) if number == signal.SIGKILL else resumed >= 125
    assert noted[-1] == 200
    manifest = STAGES["train"].kind.read(spec.output.uri)
    assert manifest.metrics == pytest.approx(expected, rel=1e-4)
    assert manifest.cost is not None and manifest.cost.attempts == 2
    parts = cost.parts(spec.output.uri)
    assert sorted(part.rank for part in parts) == [0, 0, 1, 1]
    assert 0 < manifest.cost.device_seconds <= sum(part.device_seconds for part in parts)


@pytest.mark.parametrize("who", ["torchrun", pytest.param("one rank", marks=pytest.mark.full)])
def test_preempted_ranks_save_and_say_so(
    who: str, latents: LatentManifest, lines: pytest.LogCaptureFixture, nothing_left: None
) -> None:
    def preempt(done: int, total: int, unit: str) -> None:
        if done == 200:
            process = ranks()[1]
            os.kill(process.pid if who == "one rank" else process.ppid(), signal.SIGTERM)

    spec = job(latents, ENDLESS, TrackingSpec(uri=dead_address(), run_id="0" * 32))
    with pytest.raises(PreemptedError, match=r"^stopped by SIGTERM at step [\d,]+; run the same command") as told:
        launcher.run(spec, LocalLaunch(nproc=2, max_restarts=0), progress=preempt, log=LOG)
    step = int(str(told.value).split()[5].rstrip(";").replace(",", ""))
    assert Path(spec.output.uri, "checkpoints", f"step-{step:09d}", "record.json").exists()
    steps = [record["step"] for record in unsent(spec.output) if record.get("metric") == "loss"]
    assert steps == list(range(50, step + 1, 50))


class Cancelled(BaseException):
    """As Prefect cancels a flow."""


def test_a_cancelled_launch_ends_its_ranks_in_order(latents: LatentManifest, nothing_left: None) -> None:
    """They get the time to keep what MLflow, which is away, did not take."""
    others, alive = set(descendants()), list[int]()

    def cancel(done: int, total: int, unit: str) -> None:
        if done >= 200:
            alive.extend(set(descendants()) - others)
            raise Cancelled

    spec = job(latents, ENDLESS, TrackingSpec(uri=dead_address(), run_id="0" * 32))
    with pytest.raises(Cancelled):
        launcher.run(spec, LocalLaunch(nproc=1), progress=cancel, log=LOG)
    assert len(alive) >= 2  # torchrun and the rank
    assert all_gone(alive)
    steps = [record["step"] for record in unsent(spec.output) if record.get("metric") == "loss"]
    assert steps[:4] == [50, 100, 150, 200]


def test_a_killed_launcher_leaves_no_torchrun_and_no_rank(latents: LatentManifest, tmp_path: Path) -> None:
    spec = tmp_path / "job.json"
    spec.write_text(job(latents, ENDLESS).model_dump_json())
    script = """
import logging, sys
from pathlib import Path
from flows.launch import start as launcher
from flows.launch.spec import WorkerSpec
spec = WorkerSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
report = lambda *_: print("works", flush=True)
launcher.run(spec, launcher.LocalLaunch(nproc=2), progress=report, log=logging.getLogger())
"""
    launcher = start(script, spec)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "works\n"
    pids = descendants(launcher.pid)
    assert len(pids) >= 3  # torchrun and two ranks
    launcher.kill()
    launcher.wait()
    until(lambda: all_gone(pids))


def test_a_rank_does_not_begin_when_its_launcher_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by a torchrun that was killed at once: nothing would ever end it."""
    departed = start("")
    departed.wait()
    assert gone(departed.pid)
    monkeypatch.setenv("DITFLOW_LAUNCHER", str(departed.pid))
    rank = start(f"from flows.launch.worker import main; print(main({str(tmp_path / 'no-such-spec')!r}))")
    assert rank.communicate()[0] == ""
    assert rank.returncode == 1


def test_the_log_of_a_rank_has_all_letters_in_any_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with child([sys.executable, "-m", "flows.launch.worker", str(tmp_path / "图 é")]) as rank:
        assert rank.stdout is not None
        log = RankLog(Noted(), (logged := list[str]()).append)
        log.read(rank.stdout)
        assert "图 é" in "".join(logged)
        assert "图 é" in str(log.failure(rank.wait()))


def take(*lines: str) -> tuple[list[str], list[tuple[int, int, str]]]:
    noted, logged = Noted(), list[str]()
    RankLog(noted, logged.append).read(lines)
    return logged, noted.progress


def test_a_message_behind_an_unfinished_line_is_understood() -> None:
    progress = MARK + '{"done": 1, "total": 2, "unit": "steps"}'
    assert take(f"loading... {progress}\n") == (["loading... "], [(1, 2, "steps")])


@pytest.mark.parametrize("torn", [MARK + '{"done": 1, "tot', MARK + "[]", MARK, "plain", ""])
def test_a_torn_message_is_a_line_of_the_log(torn: str) -> None:
    assert take(torn) == ([torn], [])


def error(kind: str, rank: int, *, foreseen: bool = False) -> str:
    return MARK + json.dumps({"error": "what happened", "kind": kind, "rank": rank, "foreseen": foreseen})


def test_the_cause_is_told_and_not_its_effects() -> None:
    """When one rank goes, the others fail for want of it, and may be heard first."""

    def failure(code: int, *lines: str) -> DitflowError:
        ranks = RankLog(Noted(), lambda _: None)
        ranks.read("\n".join(lines).splitlines())
        return ranks.failure(code)

    effect, cause = error("RuntimeError", 0), error("InputError", 1, foreseen=True)
    full = error("StorageError", 1, foreseen=True)
    report = "  rank      : {} (local_rank: {})\n  exitcode  : {} (pid: 7)  (SIG)\n"
    killed = report.format(0, 0, -15) + report.format(1, 1, -7)
    assert str(failure(1, effect, cause, killed)) == "what happened"
    assert str(failure(1, full, cause, killed)) == "what happened"
    assert str(failure(1, effect, full, killed)) == "rank 1 failed: StorageError: what happened"
    assert not isinstance(failure(1, effect, full, killed), LostRankError)
    assert isinstance(failure(75, effect, error("PreemptedError", 1, foreseen=True)), PreemptedError)
    assert str(failure(1, effect, killed)) == "rank 1 was killed by SIGBUS"
    assert str(failure(1, effect)) == "rank 0 failed: RuntimeError: what happened"
    assert "rank 1 exited with code 3" in str(failure(1, report.format(1, 1, 3)))
    assert "code -9" in str(failure(-9))
