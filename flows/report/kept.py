"""Pages and plots as outputs: each is one file that is written once, with what it shows as its parents."""

import logging
from collections.abc import Callable, Mapping

from storage import uri
from storage.config import Config
from storage.errors import DitflowError
from storage.manifest import Manifest, StageOutput, stage_output

LOGGER = logging.getLogger(__name__)


class ReportManifest(Manifest):
    """The page of a pipeline."""

    STAGE = "reports"


class ScalingManifest(Manifest):
    """A plot of the distance against compute."""

    STAGE = "scaling"


def output(kind: type[Manifest], version: int, config: Config, shown: Mapping[str, Manifest], root: str) -> StageOutput:
    """The output that shows some others, which are named by keys of any text. Nothing is written."""
    return stage_output(root, kind.STAGE, version, config, parents=shown, inputs={})


def kept(out: StageOutput, kind: type[Manifest], name: str) -> bytes | None:
    """The file of an output; None if it is not there. A damaged one, or one of other bytes of a parent, is removed."""
    try:
        manifest = out.committed(kind)
        return manifest.read_object(name) if manifest else None
    except DitflowError as error:
        LOGGER.warning("%s; it is made again", error)
        uri.remove_tree(out.uri, out.root)
        return None


def keep(out: StageOutput, kind: type[Manifest], name: str, make: Callable[[], bytes]) -> bytes:
    """The file of an output, which is made and committed unless it is there.

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    data = kept(out, kind, name)
    if data is None:
        data = make()
        out.begin()
        out.commit(kind, [out.put(name, data)])
    return data
