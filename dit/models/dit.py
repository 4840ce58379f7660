"""The diffusion transformer of Peebles & Xie (arXiv 2212.09748)."""

# B = batch, C = latent channels, H = W = input_size, N = tokens, K = tokens of the condition, D = width

import torch
from torch import Tensor, nn

from dit.models.blocks import BLOCKS
from dit.models.config import DiTConfig
from dit.models.layers import unpatchify
from dit.models.patch_transformer import PatchTransformer


class DiT(PatchTransformer):
    """Predicts noise, and the variance interpolation if learned, from a noisy latent.

    Names and shapes of the parameters are those of the published checkpoints, the fixed position
    table included.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.config = config
        block = BLOCKS[config.block]
        self.blocks = nn.ModuleList(block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = block.FINAL_LAYER(config.width, config.patch_size**2 * config.out_channels)
        self.init_weights()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `PatchTransformer.forward`."""
        tokens, c = self.tokens(x), self.conditions(t, y, x.dtype)
        if self.config.block in ("adaln", "adaln_zero"):
            c = c.sum(1)
        elif self.config.block == "in_context":
            tokens = torch.cat([tokens, c], dim=1)
        for block in self.blocks:
            tokens = block(tokens, c)
        patches = self.final_layer(tokens[:, : self.config.grid**2], c)
        return unpatchify(patches, self.config.grid, self.config.patch_size)
