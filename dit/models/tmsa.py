"""Time-dependent multi-head self-attention, TMSA (DiffiT: Hatamizadeh et al., arXiv 2312.02139).

The network's task changes with the noise level. So queries, keys and values are functions of the tokens x and of the
condition c (time, or time plus label), instead of scaling and shifting tokens as DiT does:

    q = x W_q + c U_q,    k = x W_k + c U_k,    v = x W_v + c U_v        (in each head, with biases)
    TMSA(x, c) = softmax(q k' / sqrt(d) + B) v W_o

B is a learned bias for each head and each relative position (dy, dx) of two tokens in a window. All tokens share c, so
c U_k adds the same q . c U_k to all logits of a query, and softmax cancels it: U_k has no effect, but the published
parameter counts include it.

The paper compares it with a block whose MLP sees the time, and with a time token of its own ("separate" token), and
says no more of them. Here the rest of the block stays as it is, and they are (`dit.models.config.ConditionOption`)

    mlp      q, k, v of x alone, and hidden units GELU(x W_1 + c U_1), where TMSA's MLP has GELU(x W_1)
    token    q of x; k, v of the N + 1 tokens x and c U; B is 0 at the token of c, which has no place. It is new in
             each block and in each window, so the queries, and the output, are those of the N tokens of the image

With E = D, c costs TMSA 3 D^2 parameters a block (2 D^2 have an effect), mlp 4 D^2 (with the usual ratio), token D^2.
"""

# B = images, W = windows in an image, N = tokens in a window = w * w, D = width, E = width of the condition, h = heads
# K = tokens that are attended to: N, or N + 1 with that of the condition

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit.models.config import ConditionKind
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
    """Self-attention in windows, with a learned bias. It sees the condition as chosen."""

    def __init__(self, width: int, heads: int, time_width: int, window: int, condition: ConditionKind = "tmsa") -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.time_qkv = nn.Linear(time_width, 3 * width) if condition == "tmsa" else None
        self.time_token = nn.Linear(time_width, width) if condition == "token" else None
        self.bias = RelativeBias(window, heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B * W, N, D), windows of an image next to each other, and conditions (B, E), to (B * W, N, D)."""
        q, k, v, bias = self._parts(x, c)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out

    def weights(self, x: Tensor, c: Tensor) -> Tensor:
        """How much each query attends to each key: (B * W, h, N, K), whose rows sum to 1. Arguments as `forward`.

        It is the attention itself, given the unit vectors as values.
        """
        q, k, _, bias = self._parts(x, c)
        units = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
        return F.scaled_dot_product_attention(q, k, units, attn_mask=bias)

    def _parts(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries (B * W, h, N, D/h), keys and values (B * W, h, K, D/h), and the bias (h, N, K)."""
        windows, tokens, bias = x.shape[0] // c.shape[0], x.shape[1], self.bias()
        if self.time_token is not None:
            token = self.time_token(c).repeat_interleave(windows, dim=0)
            x, bias = torch.cat([x, token[:, None]], dim=1), F.pad(bias, (0, 1))
        qkv = self.qkv(x)
        if self.time_qkv is not None:
            qkv = qkv + self.time_qkv(c).repeat_interleave(windows, dim=0)[:, None]
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q[:, :, :tokens], k, v, bias.to(q.dtype)


class TimeMlp(nn.Module):
    """Linear, tanh-approximated GELU, Linear on each token. A Linear of the condition joins the hidden units."""

    def __init__(self, width: int, hidden: int, time_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.time_fc1 = nn.Linear(time_width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B * W, N, D) and conditions (B, E) to (B * W, N, D)."""
        shift = self.time_fc1(c).repeat_interleave(x.shape[0] // c.shape[0], dim=0)
        out: Tensor = self.fc2(F.gelu(self.fc1(x) + shift[:, None], approximate="tanh"))
        return out


class TMSABlock(nn.Module):
    """x + TMSA(LN(x), c), then x + MLP(LN(x)). Only TMSA sees the condition, or only the MLP if so chosen."""

    def __init__(
        self,
        width: int,
        heads: int,
        time_width: int,
        window: int,
        mlp_ratio: float,
        condition: ConditionKind = "tmsa",
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = layer_norm(width)
        self.attn = TMSA(width, heads, time_width, window, condition)
        self.norm2 = layer_norm(width)
        self.mlp = TimeMlp(width, hidden, time_width) if condition == "mlp" else Mlp(width, hidden)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B * W, N, D) and conditions (B, E) to tokens."""
        x = x + self.attn(self.norm1(x), c)
        normed = self.norm2(x)
        out: Tensor = x + (self.mlp(normed, c) if isinstance(self.mlp, TimeMlp) else self.mlp(normed))
        return out
