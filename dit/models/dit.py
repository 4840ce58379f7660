"""DiT, the diffusion transformer of Peebles & Xie (arXiv 2212.09748).

A noisy latent is cut into patches of p x p, and a Linear layer makes each a token; fixed sines and cosines of row and
column are added (`dit.models.layers.grid_sinusoid`). The timestep t becomes a vector as well, by an MLP of 128 cosines
and 128 sines of t at frequencies from 1 down to about 1/10000. The label is looked up in a table, whose last row
stands for no label. Their sum c conditions every block (`dit.models.blocks`, where the paper's four ways are). A last
Linear layer makes each token a patch again: C channels of noise, and C of the variance's interpolation v.

Cost: a block takes 12 D^2 multiply-accumulates a token in Linear layers and 2 N D in attention. Halving p makes four
times as many tokens with hardly any more parameters, and the paper finds that quality follows compute.

LightningDiT (arXiv 2501.01423) is the same network with some of `dit.models.config.BackboneOptions`: RMS norms, gated
MLPs, and queries and keys rotated by the place of their token.
"""

# B = batch, C = latent channels, H = W = input_size, N = tokens, K = tokens of the condition, D = width

import torch
from torch import Tensor, nn

from dit.models.blocks import BLOCKS
from dit.models.config import DiTConfig
from dit.models.layers import grid_rotation, unpatchify
from dit.models.patch_transformer import PatchTransformer


class DiT(PatchTransformer):
    """Predicts the noise in a latent and, if learned, the variance.

    Names and shapes of the parameters are those of the published checkpoints, the fixed position
    table included.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.config = config
        block = BLOCKS[config.block]
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.final_layer = block.FINAL_LAYER(config)
        self.init_weights()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `PatchTransformer.forward`."""
        tokens, c = self.tokens(x), self.conditions(t, y, x.dtype)
        head_width = self.config.width // self.config.heads
        rotation = grid_rotation(head_width, self.config.grid, x.device) if self.config.rope else None
        if self.config.block in ("adaln", "adaln_zero"):
            c = c.sum(1)
        elif self.config.block == "in_context":
            tokens = torch.cat([tokens, c], dim=1)
        for block in self.blocks:
            tokens = block(tokens, c, rotation)
        patches = self.final_layer(tokens[:, : self.config.grid**2], c)
        return unpatchify(patches, self.config.grid, self.config.patch_size)
