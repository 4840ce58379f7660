"""The science: models, diffusion, samplers, training and metrics.

Knows torch and storage; no Prefect and no MLflow. Each verb is a module: `dit.fit` trains on images in memory,
`dit.draw` draws samples of a model, and `dit.compare` measures them. `dit.encode`, `dit.train`, `dit.average`,
`dit.sample` and `dit.evaluate` are the stages, which read and commit outputs.
"""

from dit.export import Trained, load
from dit.models.build import build

__all__ = ["Trained", "build", "load"]
