"""The diffusion transformer of Peebles & Xie (arXiv 2212.09748)."""

# B = batch, C = latent channels, H = W = input_size, N = tokens, D = width, p = patch_size

import torch
from torch import Tensor, nn

from dit.models.blocks import BLOCKS
from dit.models.config import DiTConfig
from dit.models.layers import FinalLayer, LabelEmbedding, PatchEmbed, SelfInitialised, TimestepEmbedding, grid_sinusoid
from storage.errors import InputError


class DiT(nn.Module):
    """Predicts noise, and the variance interpolation if learned, from a noisy latent.

    Names and shapes of the parameters are those of the published checkpoints, the fixed position
    table included. Labels are never dropped in here: who trains passes the null label,
    `num_classes`, for the samples whose label is dropped, so that the model has no randomness.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.side = config.input_size // config.patch_size
        self.pos_embed = nn.Parameter(torch.empty(1, self.side**2, config.width), requires_grad=False)
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, config.width)
        self.t_embedder = TimestepEmbedding(config.width)
        self.y_embedder = LabelEmbedding(config.num_classes, config.width) if config.num_classes else None
        block = BLOCKS[config.block]
        self.blocks = nn.ModuleList(block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, config.patch_size**2 * config.out_channels)
        self.init_weights()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from noisy latents, given in the dtype of the weights.

        Args:
            x: noisy latents (B, C, H, W).
            t: timesteps (B,) in 0 .. 999, whole or not.
            y: labels (B,) in 0 .. num_classes, the last being the null label; None if unconditional.

        Returns:
            (B, 2C, H, W): the noise in the first C channels, then the variance interpolation, which
            is -1 at the lower and 1 at the upper bound; (B, C, H, W) without learned variance.

        Raises:
            InputError: labels for an unconditional model, or none for a conditional one.
        """
        tokens = self.x_embedder(x) + self.pos_embed
        c = self._condition(t, y, x.dtype)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self._unpatchify(self.final_layer(tokens, c))

    def init_weights(self) -> None:
        """Draw the weights anew from torch's generator, also after `to_empty` of a model made on "meta".

        Linear layers are Xavier-uniform with zero bias, except those that say otherwise themselves.
        """
        with torch.no_grad():
            self.pos_embed.copy_(grid_sinusoid(self.config.width, self.side))
        self.apply(_init_linear)
        for module in self.modules():
            if isinstance(module, SelfInitialised):
                module.init_weights()

    def _condition(self, t: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
        c: Tensor = self.t_embedder(t, dtype)
        if self.y_embedder is None:
            if y is not None:
                raise InputError("the model is unconditional (num_classes is 0): give it no labels")
            return c
        if y is None:
            raise InputError(f"the model needs labels; the null label is {self.config.num_classes}")
        label: Tensor = self.y_embedder(y)
        return c + label

    def _unpatchify(self, patches: Tensor) -> Tensor:
        p = self.config.patch_size
        grid: Tensor = patches.unflatten(2, (p, p, -1)).unflatten(
            1, (self.side, self.side)
        )  # (B, rows, columns, p, p, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
