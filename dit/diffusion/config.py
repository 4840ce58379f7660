"""Configs of the diffusion processes."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from storage.config import Config


class DiffusionConfig(Config):
    """Gaussian diffusion in discrete time (Ho et al., arXiv 2006.11239)."""

    kind: Literal["gaussian"] = "gaussian"
    """Family of the process."""
    schedule: Literal["linear"] = "linear"
    """How the noise variance (beta) grows from the first step to the last."""
    steps: int = Field(1000, ge=2)
    """Number of diffusion steps T."""
    beta_start: float = Field(1e-4, gt=0, lt=1)
    """Noise variance (beta) of the first step."""
    beta_end: float = Field(0.02, gt=0, lt=1)
    """Noise variance (beta) of the last step."""

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}")
        return self


class EDMConfig(Config):
    """Diffusion over continuous noise levels (Karras et al., arXiv 2206.00364)."""

    kind: Literal["edm"] = "edm"
    """Family of the process."""
    p_mean: float = -1.2
    """Mean of ln(sigma), the logarithm of the noise levels in training."""
    p_std: float = Field(1.2, gt=0)
    """Standard deviation of ln(sigma), the logarithm of the noise levels in training."""
    sigma_data: float = Field(0.5, gt=0)
    """Standard deviation of the data, from which the scaling of the network's input and output follows."""


ProcessConfig = Annotated[DiffusionConfig | EDMConfig, Field(discriminator="kind")]
"""Any process; ``kind`` says which."""
