"""Which diffusion process a checkpoint was trained for, as far as it says so.

SiT, REPA and plain LightningDiT have the names and shapes of a DiT, but were trained by flow matching.
"""

import re
from typing import Final

from torch import Tensor

from dit.convert.files import Option
from dit.convert.layout import TIME_QKV
from dit.diffusion.config import DiffusionConfig
from storage import uri
from storage.errors import InputError

NO_FLOW: Final = "flow matching, which does not exist here; only DiTs that predict noise are read"
FLOW: Final = re.compile(r"(?<![a-z])(sit|repa|lightningdit|fasterdit)(?![a-z])", re.IGNORECASE)
"""Names of models that are trained by flow matching."""
MODEL_OPTIONS: Final = ("model", "model_type", "model_name", "arch")
NOISE: Final = ("noise", "eps", "epsilon")
PUBLISHED: Final = {
    "prediction": NOISE,
    "prediction_type": NOISE,
    "predict_xstart": ("false",),
    "noise_schedule": ("linear",),
    "beta_schedule": ("linear",),
    "diffusion_steps": ("1000",),
    "num_train_timesteps": ("1000",),
}
"""Options that name a process, and their values for the published one."""


def process(
    options: dict[str, Option], tensors: dict[str, Tensor], source: str, told: str | None
) -> tuple[DiffusionConfig, list[str]]:
    """The process that a checkpoint's options name, and what was assumed, a line each.

    Args:
        options: plain values beside the weights.
        tensors: the weights.
        source: location of the checkpoint; its name may be that of another model.
        told: ``gaussian`` if the user says so; None if not.

    Raises:
        InputError: the options or, unless the user says otherwise, the file's name are those of another process.
    """
    where = uri.redact(source)
    if _names_the_published(options, where) or told:
        return DiffusionConfig(), []
    if found := FLOW.search(where.rpartition("/")[2]):
        hint = "if this one predicts noise, pass --process gaussian"
        raise InputError(f"{where}: is named after {found[0]}, a model trained by {NO_FLOW}; {hint}")
    if any(TIME_QKV in name for name in tensors):
        known = "it predicts noise of 1000 linear steps, as the published DiffiT"
        return DiffusionConfig(), [f"assumed: {known}. --process gaussian confirms"]
    flows = "SiT, REPA and LightningDiT, trained by flow matching, look the same and would draw noise"
    return DiffusionConfig(), [
        f"assumed: it predicts noise of 1000 linear steps, as the published DiT; {flows}. --process gaussian confirms"
    ]


def _names_the_published(options: dict[str, Option], where: str) -> bool:
    """Whether options name the published process. Refuses those of another."""
    named = False
    for name, value in options.items():
        key, text = name.rpartition(".")[2].replace("-", "_"), str(value)
        model = key in MODEL_OPTIONS
        if key == "path_type" or (model and FLOW.search(text)) or (key == "prediction" and text in ("v", "velocity")):
            raise InputError(f"{where}: its {name} is {text}, so it was trained by {NO_FLOW}")
        if key in PUBLISHED and text.lower() not in PUBLISHED[key]:
            published = "the published DiT predicts noise of 1000 linear steps, and nothing else is read"
            raise InputError(f"{where}: its {name} is {text}, another process; {published}")
        named |= key.startswith("prediction") or (model and bool(re.match(r"DiT\b", text)))
    return named
