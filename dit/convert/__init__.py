"""Checkpoints of others: read into our models, and ours written for their tools.

``diffusers_pipeline.py`` is copied into the pipelines that are written, as their ``pipeline.py``, and runs there
without this package.
"""

from dit.convert.destination import Layout, summary, write
from dit.convert.pretrained import Pretrained
from dit.convert.source import read

__all__ = ["Layout", "Pretrained", "read", "summary", "write"]
