"""Networks that predict noise from a noisy latent. They know no diffusion process and no file."""
