"""Committed samples to one npz file, as ADM's evaluation suite reads them."""

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
    """Write the samples of a stage and their labels, which are -1 where there are none; a batch in memory at a time.

    Args:
        source: manifest of the samples, or the folder that it lies in.
        url: the file, by path or fsspec URL, ending in ``.npz``.
        tracker: learns how far it is.

    Raises:
        InputError: these are no samples, or the file has another ending or is there already.
        StorageError: the samples are not what was committed, or the disk is full.
    """
    if not uri.redact(url).endswith(".npz") or uri.exists(url):
        raise InputError(f"{uri.redact(url)}: name a file that ends in .npz and is not there yet")
    manifest = SampleManifest.read(source)
    images = StoredImages(RowReader(manifest), manifest.resolution, manifest.digest)
    labels = images.reader.array("label").astype(np.int64)
    npz.write(url, _told(images, tracker), labels, images.side)


def _told(images: StoredImages, tracker: Tracker) -> Batches:
    done = 0
    for batch in images.batches(BATCH):
        yield batch
        done += len(batch)
        tracker.progress(done, images.count, "images")
