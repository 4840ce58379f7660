"""Four ways to condition a transformer block on time and label (Peebles & Xie, arXiv 2212.09748, section 3.2).

A plain block adds to the tokens x what attention and MLP make of their layer norm (LN):

    x = x + Attention(LN(x));  x = x + MLP(LN(x))

in_context       the condition joins the tokens, and is removed after the last block
cross_attention  x = x + CrossAttention(LN(x), c) between the two: + 4 D^2 parameters
adaln            LN(x) becomes LN(x) (1 + scale(c)) + shift(c) in both: + 4 D^2
adaln_zero       moreover each sum becomes x + gate(c) Attention(...): + 6 D^2

Shift, scale and gate are a Linear layer of SiLU(c), which starts at zero. So an adaln_zero block starts as the
identity, which the paper finds to train best.
"""

# B = batch, N = tokens, K = tokens of the condition, D = width

from typing import ClassVar

from torch import Tensor, nn

from dit.models.config import BlockKind
from dit.models.layers import (
    Attention,
    CrossAttention,
    FinalLayer,
    Mlp,
    PlainFinalLayer,
    SelfInitialised,
    layer_norm,
    modulate,
    modulation,
    zero_modulation,
)


class InContextBlock(nn.Module):
    """A plain transformer block. The condition is among the tokens."""

    FINAL_LAYER: ClassVar = PlainFinalLayer

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width, affine=True)
        self.attn = Attention(width, heads)
        self.norm2 = layer_norm(width, affine=True)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N + K, D) to the same. The condition (B, K, D) is not used: it is among the tokens."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class CrossAttentionBlock(nn.Module):
    """Attention among the tokens, then to the condition's tokens, then an MLP."""

    FINAL_LAYER: ClassVar = PlainFinalLayer

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width, affine=True)
        self.attn = Attention(width, heads)
        self.norm_cross = layer_norm(width, affine=True)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = layer_norm(width, affine=True)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D) and the condition (B, K, D) to (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), c)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class AdaLNBlock(SelfInitialised):
    """Attention and MLP, each shifted and scaled by the condition."""

    FINAL_LAYER: ClassVar = FinalLayer

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = modulation(width, 4)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D) and the condition (B, D) to (B, N, D)."""
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
        out: Tensor = x + self.mlp(modulate(self.norm2(x), shift2, scale2))
        return out

    def init_weights(self) -> None:
        """Zero modulation: the condition has no effect at first."""
        zero_modulation(self.adaLN_modulation)


class AdaLNZeroBlock(SelfInitialised):
    """Attention and MLP, each shifted, scaled and gated by the condition. Starts as the identity."""

    FINAL_LAYER: ClassVar = FinalLayer

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
        """Zero modulation: all gates are closed, and the block is the identity."""
        zero_modulation(self.adaLN_modulation)


Block = InContextBlock | CrossAttentionBlock | AdaLNBlock | AdaLNZeroBlock

BLOCKS: dict[BlockKind, type[Block]] = {
    "in_context": InContextBlock,
    "cross_attention": CrossAttentionBlock,
    "adaln": AdaLNBlock,
    "adaln_zero": AdaLNZeroBlock,
}
"""Each takes (width, heads, mlp_ratio) and names the final layer that goes with it."""
