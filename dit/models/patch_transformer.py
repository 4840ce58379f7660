"""The common part of the transformers over patches of a latent."""

# B = batch, C = latent channels, H = W = input_size, N = tokens, K = tokens of the condition, D = width

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dit.models.config import PatchTransformerConfig
from dit.models.layers import LabelEmbedding, PatchEmbed, TimestepEmbedding, check_labels, grid_sinusoid, init_weights


class PatchTransformer(nn.Module, ABC):
    """Embeds patches, time and label.

    Labels are not dropped here: training passes the null label, `num_classes`, where a label is dropped. So
    the model has no randomness.
    """

    def __init__(self, config: PatchTransformerConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, config.width), requires_grad=False)
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, config.width)
        self.t_embedder = TimestepEmbedding(config.width)
        self.y_embedder = LabelEmbedding(config.num_classes, config.width) if config.num_classes else None

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from noisy latents, given in the dtype of the weights.

        Args:
            x: noisy latents (B, C, H, W).
            t: the process's time (B,), such as a timestep in 0 .. 999, whole or not, or a flow's time in 0 .. 1.
            y: labels (B,) in 0 .. num_classes, the last being the null label; None if unconditional.

        Returns:
            (B, 2C, H, W): what the process asks for in the first C channels, such as the noise, then the variance
            interpolation, which is -1 at the lower and 1 at the upper bound; (B, C, H, W) without learned variance.

        Raises:
            InputError: labels for an unconditional model, or none for a conditional one.
        """

    def init_weights(self) -> None:
        """Draw new initial weights from torch's generator, also after `to_empty` of a model made on "meta"."""
        tokens, width = self.pos_embed.shape[1:]
        with torch.no_grad():
            self.pos_embed.copy_(grid_sinusoid(width, round(tokens**0.5)))
        init_weights(self)

    def tokens(self, x: Tensor) -> Tensor:
        """Latents (B, C, H, W) to tokens with positions (B, N, D)."""
        out: Tensor = self.x_embedder(x) + self.pos_embed
        return out

    def conditions(self, t: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The embedded time and, if the model is conditional, label: (B, K, D) with K of 1 or 2.

        Raises:
            InputError: labels for an unconditional model, or none for a conditional one.
        """
        check_labels(y, self.num_classes)
        time: Tensor = self.t_embedder(t, dtype)
        return time[:, None] if self.y_embedder is None else torch.stack([time, self.y_embedder(y)], dim=1)
