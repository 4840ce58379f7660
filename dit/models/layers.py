"""Layers of the transformers. Parameter names are those of the published checkpoints of DiT and LightningDiT."""

# B = batch, C = channels, H, W = latent height and width, N = tokens, K = tokens of the condition, D = width, h = heads

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storage.errors import InputError

NORM_EPS = 1e-6
FREQUENCIES = 128
EMBEDDING_STD = 0.02


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values (B, h, N, D/h) to softmax(q k^T / sqrt(D/h)) v, (B, h, N, D/h)."""


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An `Attend` of plain matrix products, with the scores in float32: (B, h, N, N) are kept for the backward pass.

    Torch's fused kernel for CPUs takes half as long again for bfloat16 and its gradient, which is less exact, too.
    """
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.float() / math.sqrt(q.shape[-1])) @ k.float().transpose(2, 3)
        return scores.softmax(-1).to(v.dtype) @ v


class SelfInitialised(nn.Module, ABC):
    """A module whose initial weights differ from the default of `init_weights`."""

    @abstractmethod
    def init_weights(self) -> None:
        """Draw or set these weights."""


class PatchEmbed(SelfInitialised):
    """Patches of the latent to tokens, row by row."""

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, D)."""
        grid: Tensor = self.proj(x)
        return grid.flatten(2).transpose(1, 2).contiguous()  # else compiled bfloat16 blocks are NaN on AMX (torch 2.13)

    def init_weights(self) -> None:
        """Xavier-uniform on the flattened patch, as for a Linear of that size; zero bias."""
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))
        zero(self.proj.bias)


class TimestepEmbedding(SelfInitialised):
    """Timesteps (B,), whole or not, to (B, D) by a sinusoid of 256 numbers and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) to (B, D). The sinusoid is computed in float32 and then cast to the weights' dtype."""
        out: Tensor = self.mlp(timestep_sinusoid(t).to(dtype))
        return out

    def init_weights(self) -> None:
        """N(0, 0.02) weights."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=EMBEDDING_STD)


class LabelEmbedding(SelfInitialised):
    """Labels (B,) to (B, D). The last row of the table is the null label, `num_classes`."""

    def __init__(self, num_classes: int, width: int, std: float = EMBEDDING_STD) -> None:
        super().__init__()
        self.std = std
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        """(B,) to (B, D)."""
        out: Tensor = self.embedding_table(y)
        return out

    def init_weights(self) -> None:
        """Normal weights with standard deviation `std`."""
        nn.init.normal_(self.embedding_table.weight, std=self.std)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, D), with queries, keys and values in one Linear."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.attend: Attend = F.scaled_dot_product_attention
        """Attention of queries, keys and values; training may choose another way to compute it."""
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = head_norms(width // heads, qk_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D); queries and keys are rotated by a `grid_rotation` (2, N, D/h / 2), if given."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, h, N, D/h)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out: Tensor = self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Multi-head attention of tokens (B, N, D) to the condition's tokens (B, K, D)."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm, self.k_norm = head_norms(width // heads, qk_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D) and (B, K, D) to (B, N, D)."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, h, N, D/h)
        k, v = self.kv(c).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, h, K, D/h)
        q, k = self.q_norm(q), self.k_norm(k)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Linear, tanh-approximated GELU, Linear on each token."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class SwiGLU(nn.Module):
    """A gated MLP on each token: w3 (silu(a) b), where a and b are the halves of w12 (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        a, b = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(a) * b)
        return out


class RMSNorm(SelfInitialised):
    """x / sqrt(mean(x^2) + eps) times a learned weight, over the last dimension (arXiv 1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to the same, computed in float32 and returned in the dtype of x."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), NORM_EPS).to(x.dtype)

    def init_weights(self) -> None:
        """One."""
        nn.init.ones_(self.weight)


def layer_norm(width: int, *, affine: bool = False) -> nn.LayerNorm:
    """Layer norm; without learned scale and shift where they come from the condition."""
    return nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=affine)


def head_norms(head_width: int, normed: bool) -> tuple[nn.Module, nn.Module]:
    """The norms of each head's queries and keys (Dehghani et al., arXiv 2302.05442); without parameters if none."""
    return (RMSNorm(head_width), RMSNorm(head_width)) if normed else (nn.Identity(), nn.Identity())


def modulation(width: int, parts: int) -> nn.Sequential:
    """The condition (B, D) to shifts, scales and gates, (B, parts * D)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def zero_modulation(layer: nn.Sequential) -> None:
    """Set a modulation to zero."""
    zero(*layer.parameters())


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift, of tokens x (B, N, D), shift (B, D) and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def timestep_sinusoid(t: Tensor, frequencies: int = FREQUENCIES) -> Tensor:
    """Timesteps (B,) to float32 (B, 2F): cosines then sines of t exp(-ln(10000) i / F), i = 0 .. F - 1."""
    i = torch.arange(frequencies, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(i * (-math.log(10000.0) / frequencies))
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def grid_sinusoid(width: int, side: int) -> Tensor:
    """The fixed position table (1, side * side, width) in float32.

    The first half of the width encodes the column and the second the row. Each half is the sines and then the
    cosines of position * 10000^(-4 i / width), i = 0 .. width / 4 - 1.
    """
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    column, row = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=1)[None].float()


def grid_rotation(head_width: int, side: int, device: torch.device) -> Tensor:
    """Cosines and sines of the angles by which a head's pairs of channels are rotated: float32 (2, N, D/h / 2).

    The first half of the pairs turns with the row of the token and the second with its column, by
    position * 10000^(-4 i / head_width), i = 0 .. head_width / 4 - 1 (Su et al., arXiv 2104.09864, for each axis).
    """
    i = torch.arange(head_width // 4, dtype=torch.float32, device=device)
    line = torch.arange(side, device=device)[:, None] * 10000.0 ** (-i / (head_width // 4))
    row, column = line.repeat_interleave(side, dim=0), line.repeat(side, 1)
    angle = torch.cat([row, column], dim=1)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate neighbouring channels (2i, 2i + 1) of x (B, h, N, D/h) by a `grid_rotation`, computed in float32."""
    cos, sin = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return pairs.flatten(-2).to(x.dtype)


def check_labels(y: Tensor | None, num_classes: int) -> None:
    """Check that there are labels if the model has classes, and only then.

    Raises:
        InputError: labels are missing, or the model has no classes.
    """
    if y is not None and num_classes == 0:
        raise InputError("model: is unconditional (num_classes is 0); pass no labels")
    if y is None and num_classes > 0:
        raise InputError(f"model: needs labels; the null label is {num_classes}")


def unpatchify(patches: Tensor, side: int, patch_size: int) -> Tensor:
    """Patches (B, side * side, p * p * C), row by row and the channel last, to (B, C, side * p, side * p)."""
    squares = patches.unflatten(2, (patch_size, patch_size, -1))
    grid: Tensor = squares.unflatten(1, (side, side))  # (B, rows, columns, p, p, C)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def init_weights(model: nn.Module) -> None:
    """Draw new initial weights of a model from torch's generator.

    Linear layers are Xavier-uniform with zero bias, and norms have scale 1 and shift 0. A `SelfInitialised`
    module then sets its own.
    """
    model.apply(_init_default)
    for module in model.modules():
        if isinstance(module, SelfInitialised):
            module.init_weights()


def zero(*parameters: Tensor | None) -> None:
    """Fill parameters with zeros; None, a bias that a layer does not have, is skipped."""
    for parameter in parameters:
        if parameter is not None:
            nn.init.zeros_(parameter)


def _init_default(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        zero(module.bias)
    elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
        module.reset_parameters()
