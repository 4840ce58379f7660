"""The ways to condition a transformer block (arXiv 2212.09748, section 3.2), by name."""

# B = batch, N = tokens, D = width

from torch import Tensor

from dit.models.layers import Attention, Mlp, SelfInitialised, layer_norm, modulate, modulation, zero_modulation


class AdaLNZeroBlock(SelfInitialised):
    """Attention and MLP, each shifted, scaled and gated by the condition. Starts as the identity."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D) and the condition (B, D) to (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        out: Tensor = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return out

    def init_weights(self) -> None:
        """Close the gates."""
        zero_modulation(self.adaLN_modulation)


BLOCKS = {"adaln_zero": AdaLNZeroBlock}
"""Each takes (width, heads, mlp_ratio)."""
