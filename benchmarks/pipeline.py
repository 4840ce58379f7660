"""The cost of orchestration: the demo under Prefect and MLflow, its stages without them, and a run that skips all."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Measured, Result, main
from flows.contract import STAGES, Source
from flows.demo.digits import write_digits
from flows.recipe import Recipe, load_recipe
from storage.tracker import NullTracker


def measure() -> Measured:
    """Seconds of each stage with and without Prefect and MLflow; ``register``, which is all MLflow, is left out."""
    with tempfile.TemporaryDirectory() as folder:
        orchestrated, total = _demo(Path(folder, "full"))
        _, skipped = _demo(Path(folder, "full"))
        bare = _demo_bare(Path(folder, "bare"))
    results = [Result(f"{name}_orchestrated", seconds, "s") for name, seconds in orchestrated.items()]
    results += [Result(f"{name}_bare", seconds, "s") for name, seconds in bare.items()]
    extra = {name: orchestrated[name] - seconds for name, seconds in bare.items()}
    results += [Result(f"{name}_orchestration", seconds, "s") for name, seconds in extra.items()]
    results += [Result("demo_total", total, "s"), Result("demo_skipped", skipped, "s")]
    return results, {"orchestrated_vs_bare": sum(orchestrated[name] for name in bare) / sum(bare.values())}


def _demo(root: Path) -> tuple[dict[str, float], float]:
    begin = time.monotonic()
    command = [sys.executable, "-m", "flows.command.main", "demo", "--json", "--root", str(root)]
    report: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {stage["name"]: stage["seconds"] for stage in report["stages"]}, time.monotonic() - begin


def _demo_bare(root: Path) -> dict[str, float]:
    write_digits(root / "digits")
    splits = [f"archive.{split}={root / 'digits' / split}" for split in ("train", "held_out")]
    return bare_seconds(load_recipe("demo", splits), root)


def bare_seconds(recipe: Recipe, root: Path) -> dict[str, float]:
    """Seconds of each stage function of a recipe before ``register``, run in this process."""
    source: Source = recipe.archive
    seconds = {}
    for name in recipe.stages[: recipe.stages.index("register")]:
        stage, config, begin = STAGES[name], recipe.config_of(name), time.monotonic()
        source = stage.run(config, source, out=stage.output(str(root), config, source), tracker=NullTracker())
        seconds[name] = time.monotonic() - begin
    return seconds


if __name__ == "__main__":
    main(measure, __doc__)
