"""The config of sampling."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dit.devices import Arithmetic
from dit.export import ModelReference, WeightsName
from dit.pixels import Rounding
from dit.samplers.flow import Coefficient
from dit.samplers.guidance import Channels, Schedule
from dit.samplers.labels import Labels
from dit.vae import VaeRef
from storage.config import Config, added, operational


class SampleConfig(Config):
    """Settings of the sampling stage."""

    count: int = Field(default=50_000, ge=1)
    """Number of images to generate."""
    labels: Labels = "random"
    """Class of each image: ``random`` draws it uniformly, ``balanced`` takes the classes in turn, and a mapping such as
    ``{cat: 8, "3": 4}`` has the number of images of each class, by its name or number."""
    sampler: Literal["ddpm", "ddim", "dpm++", "heun", "euler", "euler_maruyama", "dopri5"] = "ddpm"
    """For timesteps: ``ddpm`` is ancestral sampling with the learned variance, ``ddim`` the implicit sampler,
    deterministic with ``eta`` 0, and ``dpm++`` DPM-Solver++(2M), deterministic too, for 10 to 50 steps. For EDM:
    ``heun``. For flows: ``euler`` and ``heun``, of first and second order; ``dopri5``, of fifth order with steps as a
    tolerance allows; ``euler_maruyama``, with noise on the way."""
    steps: int = Field(default=250, ge=2)
    """Sampling steps per image. Each is one pass of the network; with heun two, and one in the last step. Not used by
    dopri5."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """For ddim: share of the ancestral noise added at each step. 0: deterministic."""
    sigma_min: float = Field(default=0.002, gt=0)
    """For heun of EDM: smallest noise level, before the last step goes to 0."""
    sigma_max: float = Field(default=80.0, gt=0)
    """For heun of EDM: noise level at which sampling starts."""
    rho: float = Field(default=7.0, gt=0)
    """For heun of EDM: exponent of the noise levels; larger values make steps shorter near the data."""
    shift: float = added(1.0, gt=0)
    """For flows, but not dopri5: below 1, steps near the noise are shorter. t becomes shift t / (1 + (shift - 1) t)."""
    diffusion_coefficient: Coefficient = added("sigma")
    """For euler_maruyama: how much noise is added at time t, as w in the variance 2 w dt: the path's ``sigma``,
    ``linear`` 1 - t, ``constant`` 1, or ``sbdm``, that of the diffusion with the path's distributions."""
    last_step: float = added(0.04, ge=0.001, le=0.5)
    """For euler_maruyama: size of the last step, of times from 0 to 1, which adds no noise."""
    rtol: float = added(1e-3, ge=0)
    """For dopri5: tolerated error of a step, as a share of the sample's numbers."""
    atol: float = added(1e-6, ge=1e-9)
    """For dopri5: tolerated error of a step, added to that."""
    guidance_scale: float = Field(default=1.5, ge=0)
    """Scale of guidance: the distance from the prediction for the null label, or from the guide's, is multiplied by it.
    1: no guidance. Ignored for unconditional models without a ``guide``."""
    guide: ModelReference | None = operational(None)
    """A worse model of the same process, latents and classes, whose prediction replaces that for the null label
    (autoguidance): a smaller one, or a milestone of the same training, by its manifest or folder, its MLflow run id, or
    ``models:/name@champion`` or ``models:/name/3`` of the registry. It is no part of the identity: its content is, by
    its digest. Null: classifier-free guidance, which needs a model that was trained with label dropout."""
    guide_weights: WeightsName = added("ema")
    """Which weights of the guide: as ``weights``."""
    guidance_channels: Channels = "first3"
    """Latent channels that are guided: the first three, as in the published results of DiT and DiffiT, or all."""
    guidance_schedule: Schedule = "constant"
    """``constant`` uses the same scale at every time; ``power_cosine`` (DiffiT) lets it grow from 1 at pure noise to
    the scale at the data, in timesteps or in a flow's time. Not for EDM."""
    guidance_interval: tuple[float, float] | None = None
    """Lowest and highest time at which to guide: timestep of the full process, noise level for EDM, time from 0 at the
    noise to 1 at the data for flows. Outside of it the second pass is saved. Null: at all times."""
    rounding: Rounding = "nearest"
    """How the image's numbers become levels: ``nearest``, as in DiT, or ``down``, as in the published code of latent
    DiffiT, whose images are half a level darker."""
    weights: WeightsName = "ema"
    """Which weights to sample from: ``ema`` for the moving average, ``raw`` for those of the last step, or a further
    average of ``train.ema_decays`` or ``train.ema_power``, such as ``ema-0.999`` and ``power-0.05``."""
    vae: VaeRef | None = operational(None)
    """Decoder to use instead of the autoencoder that made the latents. Null: that autoencoder. Not for models on
    pixels."""
    precision: Arithmetic = "float32"
    """Arithmetic of model and decoder. Use tf32 on GPUs only."""
    compile: bool = False
    """Compile the model: takes minutes at the start, then sampling is faster. The last bits of the images differ."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of noise and random labels. Sample i depends only on the seed and i."""
    batch_size: int = Field(default=128, ge=1)
    """Images in one pass of the model; guidance doubles the rows. It can change the last bits of the images."""
    decode_batch_size: int = Field(default=8, ge=1)
    """Images in one pass of the decoder, which needs more memory per image than the model. It can change the last bits
    of the images."""
    block_rows: int = Field(default=1024, ge=1)
    """Images in one object of the store, the unit of work and resume."""

    @model_validator(mode="before")
    @classmethod
    def _counts(cls, values: Any) -> Any:
        """Counts of classes say how many images there are."""
        labels = values.get("labels") if isinstance(values, dict) else None
        if isinstance(labels, dict) and all(type(count) is int for count in labels.values()):
            return {"count": sum(labels.values())} | values
        return values

    @model_validator(mode="after")
    def _count_is_that_of_labels(self) -> Self:
        chosen = self.count if isinstance(self.labels, str) else sum(self.labels.values())
        if chosen != self.count:
            raise ValueError(f"count: {self.count} images, but the labels are {chosen}; set count to {chosen}")
        return self
