"""A plain DiT as one writes it in an afternoon: torch's layers, `scaled_dot_product_attention`, and nothing else.

It stands for the many loops that begin so. Its parameters have the published names, so it takes the weights of ours.
"""

# B = batch, C = latent channels, H = side, N = tokens, D = width, p = patch size

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit.models.config import DiTConfig

EPS = 1e-6


class MinimalAttention(nn.Module):
    """Self-attention of tokens (B, N, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        count, tokens, width = x.shape
        q, k, v = self.qkv(x).view(count, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(count, tokens, width))
        return out


class MinimalMlp(nn.Module):
    """Two Linear layers with a GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class MinimalBlock(nn.Module):
    """A block of adaLN-Zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.attn = MinimalAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.mlp = MinimalMlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, N, D) and the condition (B, D) to (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        out: Tensor = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return out


class MinimalFinal(nn.Module):
    """Tokens to patches."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, N, D) and the condition (B, D) to (B, N, p * p * outputs)."""
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=2)
        out: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return out


class MinimalDiT(nn.Module):
    """DiT with adaLN-Zero."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.patch, self.grid = patch, config.input_size // patch
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, width), requires_grad=False)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.in_channels, width, patch, stride=patch)})
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, width)})
        self.blocks = nn.ModuleList(MinimalBlock(width, config.heads) for _ in range(config.depth))
        self.final_layer = MinimalFinal(width, patch * patch * config.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Latents (B, C, H, H), timesteps (B,) and labels (B,) to (B, outputs, H, H)."""
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=x.device) / 128)
        angle = t[:, None].float() * frequencies
        time = self.t_embedder["mlp"](torch.cat([angle.cos(), angle.sin()], dim=1))
        c = time + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).view(len(x), self.grid, self.grid, self.patch, self.patch, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, self.grid * self.patch, self.grid * self.patch)
