"""Bytes at rest: URLs, manifests, image archives, tars and zarr arrays.

This floor knows no torch, no Prefect and no MLflow.
"""
