"""Checkpoints of others: read into our models, and ours written for their tools.

``diffusers_pipeline.py`` is copied into the pipelines that are written, as their ``pipeline.py``, and runs there
without this package.
"""

from dit.convert.destination import Layout, summary, write
from dit.convert.pretrained import Hints, Pretrained, described
from dit.convert.source import read

__all__ = ["Hints", "Layout", "Pretrained", "described", "read", "summary", "write"]
