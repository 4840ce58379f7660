import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test, or what it calls, leaves in the environment does not reach the next one."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prefect server that flows in this process and in child processes run against."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import services

    home = tmp_path_factory.mktemp("prefect")
    with services.prefect_server(home) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", f"{address}/api")
        with temporary_settings({PREFECT_API_URL: f"{address}/api"}):
            yield address


@pytest.fixture(scope="session")
def tracking_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, made once: its migrations take seconds."""
    from flows.runs import open_client

    root = tmp_path_factory.mktemp("template")
    open_client(str(root))
    return root / "mlflow.db"


assert "PREFECT_API_URL" not in os.environ, "the tests start their own Prefect server"
