"""Metrics, artifacts and progress of a stage: to MLflow, to Prefect and to the terminal."""
