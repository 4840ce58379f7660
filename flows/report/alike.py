"""Evaluations of a root that differ from one in nothing but what a series varies."""

import logging
from collections.abc import Callable

from pydantic import ValidationError

from dit.evaluate import MetricsManifest
from storage import uri
from storage.errors import InputError, one_line
from storage.manifest import finished_outputs

LOGGER = logging.getLogger(__name__)


def alike(metrics: MetricsManifest, root: str, fixed: Callable[[MetricsManifest], object]) -> list[MetricsManifest]:
    """The finished evaluations of a root for which ``fixed`` is the same as for a given one, that one included.

    Returns:
        They are in the order of their digests. One that cannot be read, or whose parents are gone, is left out with a
        warning.

    Raises:
        InputError: what the given one was made from is gone.
        StorageError: the store does not answer.
    """
    own, excluded = fixed(metrics), MetricsManifest.folder(root, metrics.digest)
    found = [metrics]
    for folder in finished_outputs(root, MetricsManifest.STAGE):
        if folder != excluded:
            try:
                other = MetricsManifest.read(folder)
                found += [other] if fixed(other) == own else []
            except (InputError, ValidationError) as error:  # or its config is of another version
                LOGGER.warning("left out of the report: %s: %s", uri.redact(folder), one_line(error))
    return sorted(found, key=lambda each: each.digest)
