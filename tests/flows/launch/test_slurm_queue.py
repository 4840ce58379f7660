"""What jobs of Slurm are not to know."""

import pytest

from flows.launch.slurm_queue import ask


def test_a_job_has_no_key_of_the_prefect_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, f"secret of {name}")
    said = ask("env").stdout
    assert "secret of PREFECT" not in said
    assert "secret of MLFLOW_TRACKING_PASSWORD" in said  # ranks log to MLflow
