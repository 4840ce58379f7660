import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from command_line import write_images
from faults import MlflowServer, all_gone, descendants, prefect_at
from launching import LOG, write_latents
from mlflow import MlflowClient
from pipelines import KEPT
from prefect_rest import PASSWORD
from small import few_digits
from until import until

from flows import children, servers
from flows.launch import start as launcher
from flows.tracking import progress, sink
from storage.latents import LatentManifest


@pytest.fixture(scope="module", autouse=True)
def environment_of_module() -> Iterator[None]:
    """What a module's fixtures, or what they call, leave in the environment does not reach the next module."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test, or what it calls, leaves in the environment does not reach the next one."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session", autouse=True)
def patience() -> Iterator[None]:
    """The product's own time limits decide nothing, however slow the machine is."""
    limits = [(children, "GRACE_SECONDS"), (launcher, "SHUTDOWN_SECONDS"), (servers, "START_SECONDS")]
    limits += [(servers, "ANSWER_SECONDS"), (sink, "CLOSE_SECONDS"), (progress, "FLUSH_SECONDS")]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in limits:
            patch.setattr(module, name, 500)
        yield


@pytest.fixture(scope="session")
def prefect(prefect_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server."""
    home = tmp_path_factory.mktemp("prefect")
    shutil.copy(prefect_template, home)
    with servers.prefect_server(home, password=PASSWORD) as server:
        yield server.address


@pytest.fixture(scope="module")
def prefect_api(prefect: str) -> Iterator[str]:
    """A real Prefect server that flows in this process and in child processes run against."""
    with prefect_at(prefect):
        yield prefect


@pytest.fixture(scope="session")
def mlflow_process(tracking_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("tracking") / "mlflow", tracking_template)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def mlflow_server(mlflow_process: MlflowServer) -> Iterator[MlflowServer]:
    """A real MLflow server that this process and child processes use; models and runs of other modules are there."""
    mlflow_process.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_process.address)
        yield mlflow_process


@pytest.fixture(scope="session")
def prefect_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of a Prefect server."""

    def make(home: Path) -> None:
        upgrade = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
        subprocess.run(upgrade, env=os.environ | servers.prefect_env(home), stdout=subprocess.DEVNULL, check=True)

    return made_once(tmp_path_factory, "prefect.db", make)


@pytest.fixture(scope="session")
def tracking_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database."""

    def make(home: Path) -> None:
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


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture
def root(tmp_path: Path, tracking_template: Path) -> Path:
    (tmp_path / "root").mkdir()
    shutil.copy(tracking_template, tmp_path / "root" / "mlflow.db")
    return tmp_path / "root"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What launches log."""
    caplog.set_level(logging.INFO, LOG.name)
    return caplog


@pytest.fixture
def latents(tmp_path: Path) -> LatentManifest:
    return write_latents(tmp_path)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few scans of every digit."""
    return few_digits(tmp_path_factory.mktemp("digits") / "digits", KEPT)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No process that a test started is left."""
    before = set(descendants())
    yield
    until(lambda: all_gone(set(descendants()) - before))


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
