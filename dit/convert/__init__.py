"""Checkpoints of others: read into our models, and ours written for their tools.

``pipeline.py`` is copied into the pipelines that are written, to run there without this package.
"""

from dit.convert.destination import Layout, summary, write
from dit.convert.pretrained import Pretrained
from dit.convert.source import read

__all__ = ["Layout", "Pretrained", "read", "summary", "write"]
