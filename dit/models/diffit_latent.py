"""Latent DiffiT (Hatamizadeh et al., arXiv 2312.02139)."""

# B = batch, C = latent channels, H = W = input_size, N = tokens, D = width

from torch import Tensor, nn

from dit.models.config import DiffiTConfig
from dit.models.layers import SelfInitialised, layer_norm, unpatchify, zero
from dit.models.patch_transformer import PatchTransformer
from dit.models.tmsa import TMSABlock


class LatentDiffiT(PatchTransformer):
    """Predicts noise, and the variance interpolation if learned, from a noisy latent.

    Time and label enter through the attention alone, which spans the whole grid.
    """

    def __init__(self, config: DiffiTConfig) -> None:
        super().__init__(config)
        self.config = config
        width = config.width
        self.blocks = nn.ModuleList(
            TMSABlock(width, config.heads, width, config.grid, config.mlp_ratio) for _ in range(config.depth)
        )
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
