"""Whether torch on this machine computes what it should, and how fast: the checks of ``ditflow doctor``."""
