"""The config of training."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dit.devices import Arithmetic
from dit.diffusion.config import DiffusionConfig, ProcessConfig
from dit.export import ModelReference, WeightsName
from dit.latent_scale import Normalise
from dit.models.build import AnyModelChoice
from dit.models.choice import DiTChoice
from dit.models.lora import Lora
from dit.training.data import Order
from dit.training.dispersive import Dispersive
from dit.training.parallelize import Parallel
from dit.training.power import MAX_WIDTH
from storage.config import Config, added, operational


class Init(Config):
    """The weights that training starts from. The optimizer starts anew, and the averages start from these weights."""

    source: ModelReference = operational()
    """A trained model, by its manifest or folder, its MLflow run id, or ``models:/name@champion`` or
    ``models:/name/3`` of the registry; or a file or folder of others that ``ditflow convert`` reads. It is no part of
    the identity: its content is, by its digest."""
    weights: WeightsName = "ema"
    """Which weights of a model trained here: as ``sample.weights``."""
    mismatch: Literal["refuse", "reinitialise"] = operational("refuse")
    """What becomes of weights that do not fit: classes that the source does not have, by name where it has names, and
    the first and last layer of other channels. ``refuse`` names them and ends; ``reinitialise`` draws new ones.
    Position and bias tables of another latent size fit: they are computed anew and interpolated. Another depth, width
    or kind of model is always refused."""


class HeldOutLoss(Config):
    """How the loss on held-out images is measured. It changes no bit of the model."""

    every: int = Field(default=1_000, ge=1)
    """Optimizer steps between two measurements; another one follows the last step."""
    images: int = Field(default=2_048, ge=1)
    """Number of held-out images, the first of the store, where they lie in random order; or all, if there are fewer.
    Each passes eight times through the model: at four noise levels, with the EMA and with the weights themselves."""
    batch_size: int = Field(default=64, ge=1)
    """Images in one pass, on one rank. It can change the last bits of the numbers."""


class TrainConfig(Config):
    """Settings of the training stage."""

    model: AnyModelChoice = DiTChoice()
    """Model to train. Image size, channels and number of classes are taken from the data."""
    diffusion: ProcessConfig = DiffusionConfig()
    """Diffusion process that the model learns to reverse."""
    init: Init | None = added(None)
    """Weights to start from. Null: random ones."""
    freeze: tuple[Annotated[str, Field(min_length=1)], ...] = added(())
    """Parameters that are not trained, by patterns of their names such as ``blocks.*``. A pattern after ``!`` is
    trained after all; the last pattern that fits a name decides. ``["*", "!*.bias", "!y_embedder.*"]`` trains biases
    and classes only."""
    normalise: Normalise = added("scale")
    """What latents are scaled by. ``scale``: the autoencoder's scaling factor. ``channel``: mean and deviation of each
    channel over the latents to train on, so that all have mean 0 and deviation 1; the model keeps both numbers."""
    lora: Lora | None = added(None)
    """Low-rank adapters, which are trained in the place of the weights of ``init``, and are part of them in the model
    that is committed. Of the other parameters those are trained that ``freeze`` names after ``!``, such as
    ``["!y_embedder.*"]`` for new classes. Null: none."""
    steps: int = Field(default=400_000, ge=1)
    """Number of optimizer steps. A run that differs from a finished one in more steps alone goes on from its last
    checkpoint, unless ``decay`` makes the learning rate depend on their number."""
    batch_size: int = Field(default=256, ge=1)
    """Images per optimizer step, over all ranks. Must be divisible by the number of ranks. Another number is another
    run, which begins at step 0."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises linearly from 0 to its peak. 0: no warm-up."""
    warmup_images: int | None = added(None, ge=1)
    """The same in images, as EDM gives it, so that it fits any ``batch_size``. Null: ``warmup_steps`` counts."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls after the warm-up, to ``decay_to`` after the last step. ``none``: it is constant."""
    decay_to: float = Field(default=0.0, ge=0, lt=1)
    """Learning rate after the last step, as a share of its peak, if ``decay`` is not ``none``."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decays of AdamW's averages of the gradient and of its square, per step."""
    eps: float = Field(default=1e-8, gt=0)
    """What AdamW adds to the root of the averaged square of the gradient. With EDM it is meant for the published loss,
    a sum over an image's numbers."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW. 0: none."""
    gradient_clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; longer gradients are scaled down to it. Null: no clipping."""
    ema_decay: float = Field(default=0.9999, ge=0, le=1)
    """Decay per step of the exponential moving average (EMA) of the weights, from which samples are drawn."""
    ema_halflife_images: int | None = added(None, ge=1)
    """The half-life of that EMA in images instead, as EDM gives it, so that it fits any ``batch_size``: with 500,000 of
    them and a batch of 512 the decay is 0.99929. Null: ``ema_decay`` counts."""
    ema_decays: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Decays of further EMAs, exported beside the first. ``sample.weights`` selects one by name, such as
    ``ema-0.999``."""
    ema_power: tuple[Annotated[float, Field(gt=0, lt=MAX_WIDTH)], ...] = added(())
    """Relative widths of power-function averages (EDM2: ``[0.05, 0.1]``), exported beside the first and called
    ``power-0.05`` and so on. From those of the run's ``milestones`` the stage ``average`` makes an average of another
    width afterwards."""
    ema_ramp: float | None = Field(default=None, gt=0)
    """Upper bound of an EMA's half-life, as a share of the steps taken so far (EDM: 0.05). Null: no bound."""
    flips: bool = True
    """Train on images and their mirror images, with equal probability. Latents must have been encoded with flips."""
    augmentation: float = Field(default=0.0, ge=0, le=1)
    """Probability of each transformation in EDM's augmentation, of which the model is informed. Only for diffit_image
    on pixels. 0: none."""
    dispersive: Dispersive | None = added(None)
    """A term of the loss that pushes apart what a block makes of a batch's images. Null: none."""
    precision: Arithmetic = "float32"
    """Arithmetic of the forward pass. Weights are always float32. Use tf32 on GPUs only."""
    micro_batch: int | None = operational(None, ge=1)
    """Images that a rank passes through the model at once; smaller values save memory. Null: the rank's whole share of
    the batch."""
    compile: bool = False
    """Compile the model block by block: takes minutes at the start, then training is faster. The last bits of the
    numbers differ."""
    checkpoint_activations: bool = operational(False)
    """Keep only the inputs of each block, and recompute the rest in the backward pass: about a third more work, much
    less memory, the same numbers."""
    parallel: Parallel = operational("ddp")
    """How ranks hold weights, optimizer state and averages: ``ddp`` each a copy, ``fsdp`` sharded over all ranks,
    ``hsdp`` sharded over the ranks of each machine. It changes only the order of sums. A run can resume with another
    choice."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of initial weights, order of images, noise and label dropout."""
    order: Order = "shuffled"
    """``shuffled`` permutes all images anew in every epoch. ``pooled`` permutes the chunks of the store
    (``encode.chunk_rows``), then the images within each group of 16 chunks, and mirrors a chunk as a whole. Its batches
    are slightly less independent, but each chunk is fetched once an epoch, so the store can be remote."""
    reading: Literal["auto", "streamed"] = operational("auto")
    """``auto`` reads a local store in place, and first copies a remote one to this machine. ``streamed`` fetches each
    chunk when it is needed, on every rank; it needs ``order: pooled`` and no local disk."""
    verify: Literal["once", "every_start"] = operational("once")
    """When the data are compared with their hashes. ``once``: before their first use on this machine. Later starts
    trust files of the same size and times, so bits that flip on the disk go unnoticed. ``every_start``: whenever
    training starts, which reads all data."""
    milestones: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], ...] | None = operational(None)
    """Steps at which to keep the model: their distance, or a list. Each becomes an output of its own, that of a run
    with so many steps, and is named by ``train.steps`` or by its manifest. Null: none. Needs ``decay: none``."""
    held_out: HeldOutLoss | None = operational(None)
    """Also measure the loss on held-out images (``archive.held_out``), which a recipe encodes for it, at four noise
    levels with the same noise each time. It changes no bit of the model. Null: not measured."""
    log_every: int = operational(100, ge=1)
    """Optimizer steps between two log records. Milestones are logged, too."""
    sample_every: int | None = operational(None, ge=1)
    """Optimizer steps between two grids of samples, drawn with the EMA from the same noise each time. Null: no
    grids."""
    checkpoint_every: int = operational(5_000, ge=1)
    """Optimizer steps between two checkpoints; another one is saved after the last step. A killed run repeats the steps
    since its last complete one, and a run of more steps goes on from it."""
    keep_checkpoints: int = operational(2, ge=1)
    """Number of newest checkpoints to keep."""
    keep_every: int | None = operational(None, ge=1)
    """Also keep checkpoints of steps that are multiples of this number. Null: keep only the newest."""
    max_skipped: int = operational(10, ge=1)
    """Training restarts from the last checkpoint after this many steps in a row were skipped, because loss or gradient
    was not finite. The second time it fails."""

    @model_validator(mode="after")
    def _in_steps_or_in_images(self) -> Self:
        for images, steps in (("warmup_images", "warmup_steps"), ("ema_halflife_images", "ema_decay")):
            default = type(self).model_fields[steps].default
            if getattr(self, images) and getattr(self, steps) != default:
                raise ValueError(f"{images}: takes the place of {steps}, which must be left at {default}")
        return self

    @model_validator(mode="after")
    def _freezes(self) -> Self:
        if self.freeze and self.freeze[0].startswith("!") and self.lora is None:
            raise ValueError(f"freeze: {self.freeze[0]} comes first; begin with what to freeze, such as '*'")
        return self

    @model_validator(mode="after")
    def _adapts_a_trained_model(self) -> Self:
        if self.lora is not None and self.init is None:
            raise ValueError("lora: adapts a trained model; name it in train.init.source")
        if self.lora is not None and self.ema_power:
            raise ValueError("lora: averages the two factors each, which do not combine; remove ema_power")
        return self

    @model_validator(mode="after")
    def _milestones_are_shorter_runs(self) -> Self:
        if self.milestones and self.decay != "none":
            raise ValueError(f"milestones: need decay: none; with {self.decay} a run of fewer steps is another one")
        return self

    @model_validator(mode="after")
    def _streams_in_order(self) -> Self:
        if self.reading == "streamed" and self.order == "shuffled":
            raise ValueError("reading: streamed fetches a chunk for each image if order is shuffled; set order: pooled")
        return self
