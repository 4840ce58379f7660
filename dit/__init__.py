"""The science: models, diffusion, samplers, training and metrics.

Knows torch and storage; no Prefect and no MLflow.
"""

from dit.export import Trained, load

__all__ = ["Trained", "load"]
