"""The pipeline: stages as Prefect flows, tracked by MLflow, launched by torchrun.

The only floor that knows Prefect and MLflow.
"""

import gc
import os

# What imports make stays. By default the collector walks it so often that every start takes a fifth longer.
gc.set_threshold(10_000)

# MLflow reads these when it is imported, and our children inherit them.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is ours
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the default blocks a call for four minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
