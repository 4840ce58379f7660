"""Time-dependent multi-head self-attention (DiffiT: Hatamizadeh et al., arXiv 2312.02139)."""

# B = images, W = windows in an image, N = tokens in a window = w * w, D = width, E = time width, h = heads

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit.models.layers import Mlp, SelfInitialised, layer_norm

BIAS_STD = 0.02


class RelativeBias(SelfInitialised):
    """A learned number for each head and each way in which two places of a window can lie to each other."""

    def __init__(self, window: int, heads: int) -> None:
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))

    def forward(self) -> Tensor:
        """The bias (h, N, N) of each query, first, for each key.

        It is ``table[(dy + w - 1) * (2w - 1) + dx + w - 1]`` with dy and dx from key to query, read
        through strides, so that no index exists that could be shared, saved or lost. The gradient
        is summed in a fixed order.
        """
        w, side = self.window, 2 * self.window - 1
        turned = self.table.unflatten(0, (side, side)).unfold(0, w, 1).unfold(1, w, 1)  # (w, w, h, w, w)
        bias: Tensor = turned.flip(3, 4).permute(2, 0, 1, 3, 4).flatten(3).flatten(1, 2)
        return bias

    def init_weights(self) -> None:
        """Normal, cut off at two deviations."""
        nn.init.trunc_normal_(self.table, std=BIAS_STD, a=-2 * BIAS_STD, b=2 * BIAS_STD)


class TMSA(nn.Module):
    """Self-attention in which the time shifts queries, keys and values.

    The shift of the keys is the same for all of them and so cancels in the softmax; it is kept
    because the published parameter counts include it.
    """

    def __init__(self, width: int, heads: int, time_width: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.time_qkv = nn.Linear(time_width, 3 * width)
        self.bias = RelativeBias(window, heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B * W, N, D), the windows of an image next to each other, and its time (B, E), to (B * W, N, D)."""
        shift = self.time_qkv(c).repeat_interleave(x.shape[0] // c.shape[0], dim=0)
        qkv = self.qkv(x) + shift[:, None]
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B * W, h, N, D/h)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias().to(q.dtype))
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class TMSABlock(nn.Module):
    """TMSA and an MLP, each added to its input. Nothing but TMSA sees the time."""

    def __init__(self, width: int, heads: int, time_width: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = TMSA(width, heads, time_width, window)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B * W, N, D) and time (B, E) to tokens."""
        x = x + self.attn(self.norm1(x), c)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
