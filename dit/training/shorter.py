"""Runs that differ from a run in one number. It goes on from those of fewer steps, not from those of other batches.

A run of more steps passes through the states of one with fewer, if nothing else differs and the learning rate does not
depend on their number. So it takes the shorter run's newest checkpoint, and ends in the bits of a run from step 0.
"""

import logging
import re
from typing import Any

from pydantic import ValidationError

from dit.export import CheckpointManifest
from storage import uri
from storage.config import Config
from storage.errors import InputError
from storage.manifest import StageOutput, finished_outputs
from storage.parallel import threads

FOLDER = "checkpoints"
"""Folder of the checkpoints, below the stage's folder."""
MOST_IMAGES = 4096
"""Largest batch size that is looked for."""
LOGGER = logging.getLogger(__name__)


def newest_step(out: StageOutput) -> int:
    """The step of an output's newest checkpoint, complete or not; 0 if there is none."""
    return max((int(name[5:]) for name in uri.names(out.url(FOLDER)) if re.fullmatch(r"step-\d+", name)), default=0)


def shorter_runs(out: StageOutput, config: Config, *, decay: str) -> list[StageOutput]:
    """The finished runs below the same root that a run goes on from.

    They differ from it in nothing but fewer ``steps``. A forced repetition has none, since it is to do all its work
    again.

    Args:
        out: the output of the run.
        config: its config.
        decay: how its learning rate falls; unless it is ``none``, the rate of a step depends on the number of steps.

    Raises:
        StorageError: the store does not answer.
    """
    if out.header.rerun:
        return []
    found = [StageOutput(uri=other.uri, header=other) for other in runs_of_fewer_steps(out, config)]
    if found and decay != "none":
        LOGGER.warning("train.decay: %s ends at the last step, so a run of more steps begins at step 0", decay)
        return []
    return found


def warn_of_other_batch_sizes(out: StageOutput, config: Config) -> None:
    """Say in one line which runs below the same root, finished or not, differ in nothing but ``batch_size``.

    A run that is not finished tells its config to nobody, but its name is a hash of it, so all sizes are tried.

    Raises:
        StorageError: the store does not answer.
    """
    folder = uri.parent(out.uri)
    names = set(uri.names(folder)) - {uri.name(out.uri)}
    sizes = range(1, MOST_IMAGES + 1) if names and not out.header.rerun else ()
    others = {size: out.with_config(config.model_copy(update={"batch_size": size})).uri for size in sizes}
    found = [f"{uri.redact(other)} has {size}" for size, other in others.items() if uri.name(other) in names]
    if found:
        text = "train.batch_size: another one is another run, so this one begins at step 0"
        LOGGER.warning("%s; %s", text, ", ".join(found))


def runs_of_fewer_steps(out: StageOutput, config: Config) -> list[CheckpointManifest]:
    """The finished runs below the same root that differ from a run in nothing but fewer ``steps``.

    Args:
        out: the output of the run.
        config: its config.

    Raises:
        StorageError: the store does not answer.
    """
    with threads(16) as pool:
        found = pool.map(_read, finished_outputs(out.root, CheckpointManifest.STAGE))
        return [other for other in found if other and _is_shorter(other, out, config)]


def _read(folder: str) -> CheckpointManifest | None:
    try:
        return CheckpointManifest.read(folder)
    except InputError as error:
        LOGGER.warning("not looked at for checkpoints: %s", error)
        return None


def _is_shorter(other: CheckpointManifest, out: StageOutput, config: Config) -> bool:
    ours = out.header
    if (other.version, other.inputs, other.contents) != (ours.version, ours.inputs, ours.contents):
        return False
    try:
        theirs, mine = type(config).model_validate(other.config).identity(), config.identity()
    except ValidationError:  # of an earlier version of this code, with other fields
        return False
    return theirs["steps"] < mine["steps"] and _without_steps(theirs) == _without_steps(mine)


def _without_steps(identity: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name != "steps"}
