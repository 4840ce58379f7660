"""The recipes of a sweep at once on this machine: a `ditflow run` for each, so many at a time.

They use the command's Prefect server. What several of them need is made by one of them, while the others wait
(`flows.perform`).
"""

import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from subprocess import Popen
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from flows import servers, temporary
from flows.children import child, has_ended
from flows.launch.spec import LocalLaunch
from flows.shares import GPUS, shares
from flows.tracking.stage_table import duration
from storage.errors import DitflowError, InputError, PreemptedError

if TYPE_CHECKING:
    from flows.recipe import Recipe

LOGS = "sweeps"
"""Folder in the root with the log of each recipe."""
POLL_SECONDS = 0.2
_ERRORS = ("error: ", "fault: ", "preempted: ")
_KINDS: dict[int, type[DitflowError]] = {2: InputError, PreemptedError.EXIT_CODE: PreemptedError}


@dataclass(frozen=True)
class _Member:
    recipe: "Recipe"
    place: int
    process: "Popen[str]"
    results: Path
    log: Path
    began: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def error(self) -> DitflowError:
        """What its command has said last."""
        lines = self.log.read_text("utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        said = next((line for line in reversed(lines) if line.startswith(_ERRORS)), lines[-1])
        code = self.process.returncode
        kind = next(filter(said.startswith, _ERRORS), "")
        why = f"killed by {Signals(-code).name}" if code < 0 else said.removeprefix(kind)
        return _KINDS.get(code, DitflowError)(f"{why}; its log is {self.log}")


def run_members(recipes: "Sequence[Recipe]", options: Namespace) -> dict[str, DitflowError]:
    """Run recipes, ``options.parallel`` at most at a time, and print what each prints.

    When this command is interrupted, or killed, so are they.

    Returns:
        Why a recipe has failed, by name, in the order of their ends.
    """
    logs = servers.local_home(options.root) / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    at_once = min(options.parallel, len(recipes))
    parts = shares(at_once, max(recipe.launch.world_size for recipe in recipes))
    _check_gpus(recipes, parts[-1])
    waiting, failed = deque(recipes), dict[str, DitflowError]()
    free, running = deque(range(at_once)), list[_Member]()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="ditflow-")))
        try:
            while waiting or running:
                while waiting and free:
                    place = free.popleft()
                    running.append(_start(waiting.popleft(), options, folder, logs, place, parts[place], stack))
                for member in [each for each in running if has_ended(each.process)]:
                    running.remove(member)
                    free.append(member.place)
                    if error := _tell(member):
                        failed[member.recipe.name] = error
                time.sleep(POLL_SECONDS)
        except BaseException:
            for member in running:  # all at once, before the stack waits for each
                member.process.terminate()
            raise
    return failed


def _check_gpus(recipes: "Sequence[Recipe]", part: dict[str, str]) -> None:
    """Refuse a recipe that wants more than its part of the machine has."""
    if GPUS not in part:
        return
    gpus = len(part[GPUS].split(","))
    for recipe in recipes:
        if isinstance(recipe.launch, LocalLaunch) and recipe.launch.nproc > gpus:
            need = f"{recipe.name}: launch.nproc is {recipe.launch.nproc}"
            raise InputError(f"{need}, and --parallel leaves {gpus} GPUs to each recipe; set it to 0, for all of them")


def _start(
    recipe: "Recipe",
    options: Namespace,
    folder: Path,
    logs: Path,
    place: int,
    part: dict[str, str],
    stack: ExitStack,
) -> _Member:
    path, log = folder / f"{recipe.pipeline_id}.yaml", logs / f"{recipe.pipeline_id}.log"
    path.write_text(recipe.model_dump_json(), "utf-8")
    command = [sys.executable, "-m", "flows.command.main", "run", str(path), "--root", options.root]
    command += ["--patience", str(options.patience)]
    command += [f"--{name}" for name in ("json", "force", "verbose") if getattr(options, name)]
    env = part | {"PYTHONSAFEPATH": "1", "TMPDIR": temporary.outside()}
    results = path.with_suffix(".out")
    with results.open("wb") as output, log.open("wb") as errors:
        process = stack.enter_context(child(command, env=env, output=output, errors=errors))
    sys.stderr.write(f"{recipe.name}: started; its log is {log}\n")
    return _Member(recipe, place, process, results, log, time.monotonic())


def _tell(member: _Member) -> DitflowError | None:
    """Print the results of a recipe, or return why it has failed."""
    if member.process.returncode == 0:
        sys.stdout.write(member.results.read_text("utf-8"))
        sys.stdout.flush()
        sys.stderr.write(f"{member.recipe.name}: done in {duration(member.seconds)}\n")
        return None
    error = member.error()
    sys.stderr.write(f"{member.recipe.name}: failed after {duration(member.seconds)}: {error}\n")
    return error
