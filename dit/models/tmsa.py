"""Time-dependent multi-head self-attention, TMSA (DiffiT: Hatamizadeh et al., arXiv 2312.02139).

The network's task changes with the noise level. So queries, keys and values are functions of the tokens x and of the
condition c (time, or time plus label), instead of scaling and shifting tokens as DiT does:

    q = x W_q + c U_q,    k = x W_k + c U_k,    v = x W_v + c U_v        (in each head, with biases)
    TMSA(x, c) = softmax(q k' / sqrt(d) + B) v W_o

B is a learned bias for each head and each relative position (dy, dx) of two tokens in a window. All tokens share c, so
c U_k adds the same q . c U_k to all logits of a query, and softmax cancels it: U_k has no effect, but the published
parameter counts include it.
"""

# B = images, W = windows in an image, N = tokens in a window = w * w, D = width, E = width of the condition, h = heads

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit.models.layers import Mlp, SelfInitialised, layer_norm

BIAS_STD = 0.02


class RelativeBias(SelfInitialised):
    """A learned bias for each head and each relative position of two tokens in a window."""

    def __init__(self, window: int, heads: int) -> None:
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))

    def forward(self) -> Tensor:
        """The bias B (h, N, N) of each query (second dimension) and key (third).

        It is ``table[(dy + w - 1) * (2w - 1) + dx + w - 1]``, where dy and dx lead from key to query. It is read
        through strides, so there is no index buffer, and the gradient is summed in a fixed order.
        """
        w, side = self.window, 2 * self.window - 1
        windows = self.table.unflatten(0, (side, side)).unfold(0, w, 1).unfold(1, w, 1)  # (w, w, h, w, w)
        bias: Tensor = windows.flip(3, 4).permute(2, 0, 1, 3, 4).flatten(3).flatten(1, 2)
        return bias

    def init_weights(self) -> None:
        """Normal. The published code cuts it off at +-2, 100 standard deviations, which cuts nothing."""
        nn.init.normal_(self.table, std=BIAS_STD)


class TMSA(nn.Module):
    """Self-attention whose queries, keys and values depend on the condition."""

    def __init__(self, width: int, heads: int, time_width: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.time_qkv = nn.Linear(time_width, 3 * width)
        self.bias = RelativeBias(window, heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B * W, N, D), windows of an image next to each other, and conditions (B, E), to (B * W, N, D)."""
        shift = self.time_qkv(c).repeat_interleave(x.shape[0] // c.shape[0], dim=0)
        qkv = self.qkv(x) + shift[:, None]
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B * W, h, N, D/h)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias().to(q.dtype))
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class TMSABlock(nn.Module):
    """x + TMSA(LN(x), c), then x + MLP(LN(x)). Only TMSA sees the condition."""

    def __init__(self, width: int, heads: int, time_width: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = TMSA(width, heads, time_width, window)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B * W, N, D) and conditions (B, E) to tokens."""
        x = x + self.attn(self.norm1(x), c)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
