"""What the table of the stages brings with it, and whether the stages' modules say the same as the table."""

import subprocess
import sys
from pathlib import Path

import yaml

from flows.contract import STAGES

ELSE = {
    "demo": "flows.pipeline.recipe",
    "milestones": "flows.milestones.milestones",
    "pipeline": "flows.pipeline.pipeline",
    "reevaluate": "flows.reevaluate.reevaluate",
}
"""The flows that are no stages, and the example of a recipe."""


def imported(code: str, *names: str) -> list[str]:
    """Which of these modules a process has imported after some code."""
    code = f"import sys; {code}; print(*[name for name in {names} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_the_table_is_light() -> None:
    """The command line is made from it at each call."""
    assert imported("import flows.contract", "torch", "prefect", "mlflow", "numpy", "pyarrow", "dit") == []


def test_ranks_wait_for_nothing_that_they_do_not_use() -> None:
    """Each would add a second or more to every start of every rank."""
    slow = ["mlflow", "prefect", "pandas", "matplotlib", "diffusers", "scipy", "torch.distributed.tensor"]
    code = "import flows.launch.worker as worker; [s.definition for s in worker.STAGES.values() if s.ranked]"
    assert imported(code, "dit.evaluate", *slow) == ["dit.evaluate"]


def test_ranks_import_torch_after_their_signals_are_set_up() -> None:
    assert imported("import flows.launch.worker", "torch") == []


def test_every_stage_reads_one_before_it() -> None:
    names = list(STAGES)
    assert [name for name in names if STAGES[name].reads not in names[: names.index(name)]] == ["shard"]
    assert {name: stage.kind.STAGE for name, stage in STAGES.items()} == {name: name for name in STAGES}


def test_every_stage_is_deployed() -> None:
    project = yaml.safe_load(Path(__file__, "../../../prefect.yaml").resolve().read_text())
    deployed = {deployment["name"]: deployment["entrypoint"] for deployment in project["deployments"]}
    assert deployed == ELSE | {name: f"flows.stages.{name}" for name in STAGES}
