"""Writes committed samples to one npz file, as ADM's evaluation suite reads it."""

import numpy as np

from dit.metrics import npz
from dit.metrics.sets import Batches, StoredImages
from dit.sample import SampleManifest
from storage import uri
from storage.errors import InputError
from storage.rows.store import RowReader
from storage.tracker import Tracker

BATCH = 64
"""Images in memory: 12 MiB at 256 px."""


def write_npz(source: str, url: str, tracker: Tracker) -> None:
    """Write samples and their labels, -1 where there are none, with one batch in memory at a time.

    Args:
        source: manifest of the samples, or the folder that contains it.
        url: the file, by path or fsspec URL, ending in ``.npz``.
        tracker: receives the progress.

    Raises:
        InputError: there are no samples, or the file has another ending or exists already.
        StorageError: the samples are not what was committed, or the disk is full.
    """
    if not uri.redact(url).endswith(".npz"):
        raise InputError(f"{uri.redact(url)}: does not end in .npz; rename the file")
    if uri.exists(url):
        raise InputError(f"{uri.redact(url)}: exists already; name another file")
    manifest = SampleManifest.read(source)
    images = StoredImages(RowReader(manifest), manifest.resolution, manifest.digest)
    labels = images.reader.array("label").astype(np.int64)
    npz.write(url, _reporting(images, tracker), labels, images.side)


def _reporting(images: StoredImages, tracker: Tracker) -> Batches:
    done = 0
    for batch in images.batches(BATCH):
        yield batch
        done += len(batch)
        tracker.progress(done, images.count, "images")
