"""Four ways to condition a transformer block on time and label (Peebles & Xie, arXiv 2212.09748, section 3.2).

A plain block adds to the tokens x what attention and MLP make of their layer norm (LN):

    x = x + Attention(LN(x));  x = x + MLP(LN(x))

in_context       the condition joins the tokens, and is removed after the last block
cross_attention  x = x + CrossAttention(LN(x), c) between the two: + 4 D^2 parameters
adaln            LN(x) becomes LN(x) (1 + scale(c)) + shift(c) in both: + 4 D^2
adaln_zero       moreover each sum becomes x + gate(c) Attention(...): + 6 D^2

Shift, scale and gate are a Linear layer of SiLU(c), which starts at zero. So an adaln_zero block starts as the
identity, which the paper finds to train best.

LightningDiT's options (`dit.models.config.BackboneOptions`) change LN, Attention and MLP in any of the four.
"""

# B = batch, N = tokens, K = tokens of the condition, D = width, p = patch size

from typing import ClassVar

from torch import Tensor, nn

from dit.models.config import BlockKind, DiTConfig
from dit.models.layers import (
    Attention,
    CrossAttention,
    Mlp,
    RMSNorm,
    SelfInitialised,
    SwiGLU,
    layer_norm,
    modulate,
    modulation,
    zero,
    zero_modulation,
)


class FinalLayer(SelfInitialised):
    """Tokens (B, N, D) to patches, shifted and scaled by the condition."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = norm(config, affine=False)
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = modulation(config.width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D) and (B, D) to (B, N, p * p * out_channels)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out

    def init_weights(self) -> None:
        """Zero, so that an untrained model predicts zero."""
        zero_modulation(self.adaLN_modulation)
        zero(self.linear.weight, self.linear.bias)


class PlainFinalLayer(SelfInitialised):
    """Tokens (B, N, D) to patches, without the condition, which the blocks have used."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = norm(config, affine=True)
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D) to (B, N, p * p * out_channels). The condition is not used."""
        out: Tensor = self.linear(self.norm_final(x))
        return out

    def init_weights(self) -> None:
        """Zero, so that an untrained model predicts zero."""
        zero(self.linear.weight, self.linear.bias)


class InContextBlock(nn.Module):
    """A plain transformer block. The condition is among the tokens."""

    FINAL_LAYER: ClassVar = PlainFinalLayer

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = norm(config, affine=True)
        self.attn = Attention(config.width, config.heads, qk_norm=config.qk_norm)
        self.norm2 = norm(config, affine=True)
        self.mlp = mlp(config)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor | None = None) -> Tensor:
        """(B, N + K, D) to the same. The condition (B, K, D) is not used: it is among the tokens."""
        x = x + self.attn(self.norm1(x), rotation)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class CrossAttentionBlock(nn.Module):
    """Attention among the tokens, then to the condition's tokens, then an MLP."""

    FINAL_LAYER: ClassVar = PlainFinalLayer

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = norm(config, affine=True)
        self.attn = Attention(config.width, config.heads, qk_norm=config.qk_norm)
        self.norm_cross = norm(config, affine=True)
        self.cross_attn = CrossAttention(config.width, config.heads, qk_norm=config.qk_norm)
        self.norm2 = norm(config, affine=True)
        self.mlp = mlp(config)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor | None = None) -> Tensor:
        """(B, N, D) and the condition (B, K, D) to (B, N, D)."""
        x = x + self.attn(self.norm1(x), rotation)
        x = x + self.cross_attn(self.norm_cross(x), c)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class AdaLNBlock(SelfInitialised):
    """Attention and MLP, each shifted and scaled by the condition."""

    FINAL_LAYER: ClassVar = FinalLayer

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = norm(config, affine=False)
        self.attn = Attention(config.width, config.heads, qk_norm=config.qk_norm)
        self.norm2 = norm(config, affine=False)
        self.mlp = mlp(config)
        self.adaLN_modulation = modulation(config.width, 4)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor | None = None) -> Tensor:
        """(B, N, D) and the condition (B, D) to (B, N, D)."""
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1), rotation)
        out: Tensor = x + self.mlp(modulate(self.norm2(x), shift2, scale2))
        return out

    def init_weights(self) -> None:
        """Zero modulation: the condition has no effect at first."""
        zero_modulation(self.adaLN_modulation)


class AdaLNZeroBlock(SelfInitialised):
    """Attention and MLP, each shifted, scaled and gated by the condition. Starts as the identity."""

    FINAL_LAYER: ClassVar = FinalLayer

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = norm(config, affine=False)
        self.attn = Attention(config.width, config.heads, qk_norm=config.qk_norm)
        self.norm2 = norm(config, affine=False)
        self.mlp = mlp(config)
        self.adaLN_modulation = modulation(config.width, 6)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor | None = None) -> Tensor:
        """(B, N, D) and the condition (B, D) to (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rotation)
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
"""Each takes the config and names the final layer that goes with it."""


def norm(config: DiTConfig, *, affine: bool) -> nn.Module:
    """The norm of tokens; a layer norm has learned scale and shift if it is affine, an RMS norm always a weight."""
    return RMSNorm(config.width) if config.norm == "rms" else layer_norm(config.width, affine=affine)


def mlp(config: DiTConfig) -> nn.Module:
    """The MLP of a block. A gated one has two thirds of the hidden units, so about as many parameters."""
    hidden = int(config.width * config.mlp_ratio)
    return SwiGLU(config.width, 2 * hidden // 3) if config.mlp == "swiglu" else Mlp(config.width, hidden)
