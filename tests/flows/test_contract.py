"""What the table of the stages brings with it."""

import subprocess
import sys


def test_ranks_wait_for_nothing_that_they_do_not_use() -> None:
    """Each would add a second or more to every start of every rank."""
    slow = ["mlflow", "prefect", "pandas", "matplotlib", "diffusers", "scipy", "torch.distributed.tensor"]
    code = f"import sys, flows.contract, flows.launch.worker; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
