"""From a config to a process."""

import torch

from dit.diffusion.config import EDMConfig, FlowConfig, ProcessConfig
from dit.diffusion.edm import EDM
from dit.diffusion.flow import Flow
from dit.diffusion.gaussian import GaussianDiffusion
from dit.diffusion.process import Process


def build_process(config: ProcessConfig, device: torch.device | str = "cpu") -> Process:
    """The process of a config, with its tables on a device."""
    if isinstance(config, EDMConfig):
        return EDM.from_config(config)
    if isinstance(config, FlowConfig):
        return Flow.from_config(config)
    return GaussianDiffusion.from_config(config).to(device)
