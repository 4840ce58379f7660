"""Configs that name a model by its run or version in MLflow, which the stages do not know."""

from typing import TypeVar

from dit.samplers.config import SampleConfig
from dit.training.config import TrainConfig
from storage import uri
from storage.config import Config

AnyConfig = TypeVar("AnyConfig", bound=Config)


def located(config: AnyConfig, root: str) -> AnyConfig:
    """The config with an absolute location in the place of what training starts from, or what guides samples.

    Raises:
        InputError: there is no such run or version, or its output is gone.
        DitflowError: MLflow does not answer.
    """
    if isinstance(config, TrainConfig) and config.init is not None:
        place = _place(config.init.source, root)
        return config.model_copy(update={"init": config.init.model_copy(update={"source": place})})
    if isinstance(config, SampleConfig) and config.guide is not None:
        return config.model_copy(update={"guide": _place(config.guide, root)})
    return config


def _place(reference: str, root: str) -> str:
    from flows.tracking import runs  # imports MLflow, which takes seconds

    return uri.absolute(runs.resolve(reference, root))
