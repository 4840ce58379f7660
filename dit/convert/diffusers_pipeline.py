"""Samples a class-conditional DiT (Peebles & Xie, arXiv 2212.09748) as its authors do, from a diffusers folder.

This file needs only torch and diffusers. Load its folder with

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

diffusers' own DiTPipeline does not give the published model's samples:

- Its time projection spaces the 128 frequencies as 10000^(-i/127), where the weights were trained with
  10000^(-i/128); so the network gets another time, further off at later timesteps.
- The LayerNorm before its MLPs has eps 1e-5 by default, where the weights were trained with 1e-6.
- It discards the learned variance: its scheduler is given the noise alone.
- Its null label is 1000, whatever the number of classes.
- It guides all latent channels, where the published numbers guide the first three of four.

Both differences of the network are set right when the pipeline is made. The sampler is DDPM (Ho et al.,
arXiv 2006.11239) on evenly spread timesteps with the learned variance (Nichol & Dhariwal, arXiv 2102.09672,
equation 15), without clipping, with its factors computed in float64 from the scheduler's config.
"""

# B = batch, C = latent channels, h = latent side, H = image side, n = steps

from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput
from diffusers.models.embeddings import Timesteps
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn


class GuidedDiTPipeline(DiffusionPipeline):
    """Labels to images by a DiT, its null label being the one after its classes."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 (diffusers reads it from the class)

    def __init__(
        self, transformer: DiTTransformer2DModel, scheduler: DDPMScheduler, vae: AutoencoderKL | None = None
    ) -> None:
        super().__init__()
        make_exact(transformer)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 1.5,
        guidance_channels: Literal["first3", "all"] = "first3",
        num_inference_steps: int = 250,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw one image a label.

        Args:
            class_labels: a class for each image, (B,).
            guidance_scale: noise = null + scale * (label - null); 1 is no guidance and one pass instead of two.
            guidance_channels: latent channels of the noise to guide.
            num_inference_steps: timesteps to visit, 2 to all.
            generator: draws the initial noise, then that of each step but the last.
            latents: initial noise (B, C, h, h) instead of a drawn one.
            output_type: PIL images, an array uint8 (B, H, H, 3), or the scaled latents (B, C, h, h).
            return_dict: whether to return an ImagePipelineOutput instead of a tuple.

        Raises:
            ValueError: no such guidance, steps or output, or there is no autoencoder to decode with.
        """
        if guidance_channels not in ("first3", "all") or output_type not in ("pil", "np", "latent"):
            raise ValueError("guidance_channels is 'first3' or 'all'; output_type is 'pil', 'np' or 'latent'")
        if output_type != "latent" and self.vae is None:
            raise ValueError("this folder has no autoencoder: pass vae= to from_pretrained, or output_type='latent'")
        config, device = self.transformer.config, self._execution_device
        shape = (len(class_labels), config.in_channels, config.sample_size, config.sample_size)
        x = randn_tensor(shape, generator, device) if latents is None else latents.to(device, torch.float32)
        y = torch.tensor(class_labels, device=device)
        guided = 3 if guidance_channels == "first3" else config.in_channels
        for step in self.progress_bar(ddpm_steps(self.scheduler.config, num_inference_steps)):
            mean, deviation = self.previous(x, y, step, guidance_scale, guided)
            x = mean if step["last"] else mean + deviation * randn_tensor(shape, generator, device)
        images = x if output_type == "latent" else self.decode(x)
        self.maybe_free_model_hooks()
        if output_type == "pil":
            images = [Image.fromarray(image) for image in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def previous(
        self, x: Tensor, y: Tensor, step: dict[str, float], scale: float, guided: int
    ) -> tuple[Tensor, Tensor | float]:
        """Mean and standard deviation, each (B, C, h, h), of the state before x (B, C, h, h)."""
        output = self.predict(x, y, int(step["timestep"]), scale, guided)
        eps, v = output[:, : x.shape[1]], output[:, x.shape[1] :]
        x0 = step["x0_from_xt"] * x - step["x0_from_eps"] * eps
        mean = step["mean_from_x0"] * x0 + step["mean_from_xt"] * x
        share = (v + 1) / 2 if v.shape[1] else torch.zeros_like(x)
        return mean, torch.exp((share * step["log_beta"] + (1 - share) * step["log_variance"]) / 2)

    def predict(self, x: Tensor, y: Tensor, timestep: int, scale: float, guided: int) -> Tensor:
        """Noise and, if learned, variance, (B, C or 2C, h, h), the first channels of the noise guided."""
        null = torch.full_like(y, self.transformer.config.num_embeds_ada_norm)
        rows, labels = (x, y) if scale == 1 else (torch.cat([x, x]), torch.cat([y, null]))
        t = torch.full_like(labels, timestep)
        rows = rows.to(self.transformer.dtype)
        output: Tensor = self.transformer(rows, timestep=t, class_labels=labels, return_dict=False)[0].float()
        if scale == 1:
            return output
        with_label, without = output.chunk(2)
        towards = without[:, :guided] + scale * (with_label[:, :guided] - without[:, :guided])
        return torch.cat([towards, with_label[:, guided:]], dim=1)

    def decode(self, latents: Tensor) -> Any:
        """Scaled latents (B, C, h, h) to an array uint8 (B, H, H, 3): 127.5 x + 128, clamped and truncated."""
        scales = self.vae.config
        z = latents / scales.scaling_factor + (scales.shift_factor or 0.0)
        pixels = self.vae.decode(z.to(self.vae.dtype)).sample.float()
        return (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def make_exact(transformer: nn.Module) -> None:
    """Give the network the frequencies and the LayerNorm eps that its weights were trained with."""
    for module in transformer.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
        elif isinstance(module, Timesteps):
            module.downscale_freq_shift = 0


def ddpm_steps(config: Any, count: int) -> list[dict[str, float]]:
    """The numbers of each step, from noise to data: of the process that visits ``count`` timesteps only."""
    total = config.num_train_timesteps
    if config.beta_schedule != "linear" or not 2 <= count <= total:
        raise ValueError(f"this pipeline takes 2 to {total} steps of a linear schedule")
    kept = [round(i * (total - 1) / (count - 1)) for i in range(count)]
    betas = torch.linspace(config.beta_start, config.beta_end, total, dtype=torch.float64)
    cumprod = (1 - betas).cumprod(0)[kept]
    previous = torch.cat([cumprod.new_ones(1), cumprod[:-1]])
    beta = 1 - cumprod / previous
    variance = beta * (1 - previous) / (1 - cumprod)
    tables = {
        "timestep": torch.tensor(kept),
        "x0_from_xt": cumprod.rsqrt(),
        "x0_from_eps": (1 / cumprod - 1).sqrt(),
        "mean_from_x0": beta * previous.sqrt() / (1 - cumprod),
        "mean_from_xt": (1 - previous) * (1 - beta).sqrt() / (1 - cumprod),
        "log_beta": beta.log(),
        "log_variance": variance.clamp(min=variance[1]).log(),
        "last": torch.arange(count) == 0,
    }
    rows = zip(*(table.tolist() for table in tables.values()), strict=True)
    return [dict(zip(tables, row, strict=True)) for row in rows][::-1]
