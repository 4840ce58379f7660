import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# A shell that starts us in the background has Ctrl-C ignored, which the processes that tests start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["OMP_NUM_THREADS"] = "1"  # several tests run at once: no process takes all cores


HEAVY = (
    "flows/test_postgres.py",
    "flows/command/test_up.py",
    "flows/launch/test_slurm.py",
    "flows/command/test_members.py",
    "flows/command/test_worker.py",
    "flows/command/test_up_people.py",
    "flows/test_demo_flow.py",
    "flows/test_pipeline.py",
    "flows/test_pages_run.py",
    "dit/test_kills.py",
    "flows/test_python.py",
    "test_notebook.py",
    "flows/test_finetune_digits.py",
    "flows/test_demo_milestones.py",
    "flows/test_evaluate_milestones.py",
    "flows/test_guided.py",
    "flows/tracking/test_away.py",
    "flows/test_killed.py",
    "flows/launch/test_start.py",
    "flows/launch/test_nodes.py",
    "dit/training/test_compile.py",
    "dit/test_train.py",
    "dit/test_train_faults.py",
    "dit/test_sample.py",
    "dit/diffusion/test_mixture.py",
    "dit/test_exact.py",
    "dit/training/test_parallelize.py",
    "dit/test_evaluate.py",
    "flows/test_shard_tasks.py",
    "flows/test_reevaluate.py",
    "flows/command/test_main.py",
    "flows/registry/test_register.py",
    "dit/test_encode.py",
    "flows/test_pipeline_s3.py",
    "flows/test_servers.py",
    "flows/test_average_stage.py",
    "flows/report/test_page.py",
    "flows/plan/test_estimate.py",
)
"""Files that take longest or need most memory. They go first: no worker is left alone with one at the end, and workers
are still small."""


STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "begin no test marked full after so many minutes: a slow machine skips the rest, and says how many"
    parser.addoption("--full-within", type=float, metavar="MINUTES", help=told)


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--full-within")
    if minutes is not None and "full" in item.keywords and time.monotonic() - STARTED > 60 * minutes:
        pytest.skip(f"not begun within {minutes:g} minutes, see --full-within")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    rank = {here / name: place for place, name in enumerate(HEAVY)}
    missing = [str(path) for path in rank if not path.exists()]
    assert not missing, f"HEAVY names files that are not there: {missing}"
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests keep nothing on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PREFECT_PROFILES_PATH", os.devnull)  # nor does what is set on it reach them
        yield


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The folder with CIFAR-10 as JPEGs (train.zip, test.zip), which is no part of the product."""
    folder = Path(os.environ.get("CIFAR10", Path(__file__).parents[2] / "shared/data/cifar10"))
    if not (folder / "train.zip").exists():
        pytest.skip(f"CIFAR-10 is not in {folder}; name its folder in the variable CIFAR10")
    return folder
