"""From a config to a process."""

import torch

from dit.diffusion.config import EDMConfig, FlowConfig, ProcessConfig
from dit.diffusion.edm import EDM
from dit.diffusion.flow import Flow
from dit.diffusion.gaussian import GaussianDiffusion
from dit.diffusion.process import Process


def build_process(config: ProcessConfig, device: torch.device | str = "cpu") -> Process:
    """The process of a config, with its tables on a device.

    Examples:
        >>> process = build_process(FlowConfig())
        >>> x0, noise = torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)
        >>> t = process.sample_t(torch.rand(4))
        >>> terms = process.training_terms(lambda x, t, y: torch.ones_like(x), x0, noise, t, None)
        >>> tuple(terms["loss"].shape)
        (4,)
    """
    if isinstance(config, EDMConfig):
        return EDM.from_config(config)
    if isinstance(config, FlowConfig):
        return Flow.from_config(config)
    return GaussianDiffusion.from_config(config).to(device)
