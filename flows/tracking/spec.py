"""The MLflow run of a stage, as its launcher passes it to rank 0."""

from storage.config import Config


class TrackingSpec(Config):
    """The MLflow run that rank 0 writes."""

    uri: str
    """MLflow's tracking URI."""
    run_id: str | None
    """None if MLflow did not answer when the stage started: then records are kept beside the manifest."""
    skip_to: int = -1
    """Last step whose metrics were recorded before a restart; -1 for none."""
