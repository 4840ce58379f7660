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
    steps: int = Field(default=1000, ge=2)
    """Number of diffusion steps T."""
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    """Noise variance (beta) of the first step."""
    beta_end: float = Field(default=0.02, gt=0, lt=1)
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
    p_std: float = Field(default=1.2, gt=0)
    """Standard deviation of ln(sigma), the logarithm of the noise levels in training."""
    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation of the data, from which the scaling of the network's input and output follows."""


class FlowConfig(Config):
    """A flow from noise to data (Ma et al., arXiv 2401.08740). Its time is 0 at the noise and 1 at the data."""

    kind: Literal["flow"] = "flow"
    """Family of the process."""
    path: Literal["linear", "gvp", "vp"] = "linear"
    """How data and noise are mixed at time t: ``linear`` as t and 1 - t, ``gvp`` as the sine and cosine of pi t / 2,
    ``vp`` as the noise variances of DDPM do."""
    predict: Literal["velocity", "noise", "data"] = "velocity"
    """What the network predicts. The loss is the mean squared error of that."""
    times: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the times in training. ``logit_normal`` has more of them in the middle."""
    logit_mean: float = 0.0
    """For logit_normal: mean of ln(t / (1 - t)); below 0 there are more times near the noise."""
    logit_std: float = Field(default=1.0, gt=0)
    """For logit_normal: standard deviation of ln(t / (1 - t))."""
    cosine: float = Field(default=0.0, ge=0)
    """Weight of a further term of the loss, as in LightningDiT: 1 minus the cosine of the angle between what is
    predicted and what is right, along the channels, in the mean over the positions. 0: none."""

    @model_validator(mode="after")
    def _logit_of_logit_normal(self) -> Self:
        if self.times == "uniform" and (self.logit_mean, self.logit_std) != (0, 1):
            raise ValueError("logit_mean and logit_std: need times: logit_normal")
        return self


ProcessConfig = Annotated[DiffusionConfig | EDMConfig | FlowConfig, Field(discriminator="kind")]
"""Any process; ``kind`` says which."""
