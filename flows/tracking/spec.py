"""Which MLflow run a stage is tracked in, as the processes that run it are told."""

from storage.config import Config


class TrackingSpec(Config):
    """The MLflow run that rank 0 writes to."""

    uri: str
    run_id: str | None
    """None when MLflow was away as the stage began: then records are kept beside the manifest."""
    skip_to: int = -1
    """Metrics up to this step were recorded before a restart."""
