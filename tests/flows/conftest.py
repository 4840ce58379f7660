import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test, or what it calls, leaves in the environment does not reach the next one."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def prefect_api(prefect: str) -> Iterator[str]:
    """A real Prefect server that flows in this process and in child processes run against."""
    from faults import prefect_at

    with prefect_at(prefect):
        yield prefect


@pytest.fixture(scope="session")
def prefect(prefect_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server."""
    from flows import servers

    home = tmp_path_factory.mktemp("prefect")
    shutil.copy(prefect_template, home)
    with servers.prefect_server(home) as address:
        yield address


@pytest.fixture(scope="session")
def prefect_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of a Prefect server."""

    def make(home: Path) -> None:
        from flows import servers

        upgrade = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
        subprocess.run(upgrade, env=os.environ | servers.prefect_env(home), stdout=subprocess.DEVNULL, check=True)

    return made_once(tmp_path_factory, "prefect.db", make)


@pytest.fixture(scope="session")
def tracking_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database."""

    def make(home: Path) -> None:
        from mlflow import MlflowClient

        MlflowClient(f"sqlite:///{home / 'mlflow.db'}").search_experiments()

    return made_once(tmp_path_factory, "mlflow.db", make)


@pytest.fixture(scope="session")
def migrated(prefect_template: Path, tracking_template: Path) -> Callable[[Path], None]:
    """Gives a root that is new the databases of its servers."""

    def give(root: Path) -> None:
        (root / "prefect").mkdir(parents=True)
        shutil.copy(prefect_template, root / "prefect")
        shutil.copy(tracking_template, root)

    return give


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A database that all workers of a test run share, since its migrations take many seconds."""
    folder = factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as making:
                make(Path(making))
                Path(making, name).replace(path)
    return path


assert "PREFECT_API_URL" not in os.environ, "the tests start their own Prefect server"
