"""Latent DiffiT (Hatamizadeh et al., arXiv 2312.02139).

Patches, positions, time, label and diffusion are DiT's (`dit.models.dit`). What differs is the block: instead of
adaptive layer norms the condition c = time + label enters the attention (TMSA, `dit.models.tmsa`), whose one window is
the whole grid. So a block needs 3 D^2 parameters for c, where DiT's needs 6 D^2: XL/2 has 561 M, DiT-XL/2 675 M.
The head is LayerNorm, SiLU and Linear, without c.
"""

# B = batch, C = latent channels, H = W = input_size, N = tokens, D = width

from torch import Tensor, nn

from dit.models.config import DiffiTConfig
from dit.models.layers import SelfInitialised, layer_norm, unpatchify, zero
from dit.models.patch_transformer import PatchTransformer
from dit.models.tmsa import TMSABlock


class LatentDiffiT(PatchTransformer):
    """Predicts the noise in a latent and, if learned, the variance."""

    def __init__(self, config: DiffiTConfig) -> None:
        super().__init__(config)
        self.config = config
        width = config.width
        shape = (width, config.heads, width, config.grid, config.mlp_ratio, config.condition)
        self.blocks = nn.ModuleList(TMSABlock(*shape) for _ in range(config.depth))
        self.final_layer = Head(width, config.patch_size**2 * config.out_channels)
        self.init_weights()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `PatchTransformer.forward`."""
        tokens, c = self.tokens(x), self.conditions(t, y, x.dtype).sum(1)
        for block in self.blocks:
            tokens = block(tokens, c)
        return unpatchify(self.final_layer(tokens), self.config.grid, self.config.patch_size)


class Head(SelfInitialised):
    """Tokens (B, N, D) to patches (B, N, patch numbers): LayerNorm, SiLU, Linear."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(width)
        self.linear = nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, out_features)."""
        out: Tensor = self.linear(nn.functional.silu(self.norm_final(x)))
        return out

    def init_weights(self) -> None:
        """Zero, so that an untrained model predicts zero."""
        zero(self.linear.weight, self.linear.bias)
