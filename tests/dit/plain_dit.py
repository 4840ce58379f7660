"""The forward pass of a file of SiT, REPA or LightningDiT, from its tensors alone and step by step."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]


def lightning_angles(width: int, side: int) -> tuple[Tensor, Tensor]:
    """The buffers of LightningDiT's RoPE, (N, head's width): rows first, then columns, each angle twice in a row."""
    lines = np.arange(side)[:, None] / 10000 ** (np.arange(0, width // 2, 2) / (width // 2))
    lines = lines.repeat(2, axis=1)
    angles = np.zeros((side, side, width))
    angles[..., : width // 2], angles[..., width // 2 :] = lines[:, None], lines[None]
    flat = angles.reshape(side * side, width)
    return torch.from_numpy(np.cos(flat)).float(), torch.from_numpy(np.sin(flat)).float()


def shapes(
    *, width: int, depth: int, channels: int, outputs: int, patch: int, classes: int = 10, lightning: bool = False
) -> dict[str, tuple[int, ...]]:
    """The shapes of the trained tensors, by their published names."""
    hidden = int(2 / 3 * 4 * width)
    found: dict[str, tuple[int, ...]] = {"y_embedder.embedding_table.weight": (classes + 1, width)}
    linears: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (width, channels, patch, patch),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch**2 * outputs, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for block in (f"blocks.{i}" for i in range(depth)):
        linears |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        linears[f"{block}.adaLN_modulation.1"] = (6 * width, width)
        if lightning:
            linears |= {f"{block}.mlp.w12": (2 * hidden, width), f"{block}.mlp.w3": (width, hidden)}
            found |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
        else:
            linears |= {f"{block}.mlp.fc1": (4 * width, width), f"{block}.mlp.fc2": (width, 4 * width)}
    if lightning:
        found["final_layer.norm_final.weight"] = (width,)
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def random_file(side: int, *, heads: int = 4, **shape: Any) -> Tensors:
    """Random tensors of these `shapes`, and the fixed tables for latents of that side."""
    generator, width, grid = torch.Generator().manual_seed(0), shape["width"], side // shape["patch"]
    found = {name: 0.1 * torch.randn(of, generator=generator) for name, of in shapes(**shape).items()}
    found["pos_embed"] = positions(width, grid)
    if shape.get("lightning"):
        cos, sin = lightning_angles(width // heads, grid)
        found |= {"feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}
    return found


def positions(width: int, side: int) -> Tensor:
    """Sines and cosines of the column, then of the row."""
    frequencies = 1 / 10000 ** (np.arange(width // 4) / (width // 4))
    rows, columns = np.divmod(np.arange(side * side), side)
    parts = [function(np.outer(place, frequencies)) for place in (columns, rows) for function in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()[None]


def forward(tensors: Tensors, x: Tensor, t: Tensor, y: Tensor, *, heads: int) -> Tensor:
    """(B, C, H, W) to (B, outputs, H, W)."""

    def linear(name: str, of: Tensor) -> Tensor:
        return F.linear(of, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(name: str, of: Tensor) -> Tensor:
        if f"{name}.weight" in tensors:
            return of / (of.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * tensors[f"{name}.weight"]
        return F.layer_norm(of, of.shape[-1:], eps=1e-6)

    def rotated(of: Tensor) -> Tensor:
        if "feat_rope.freqs_cos" not in tensors:
            return of
        turned = torch.stack([-of[..., 1::2], of[..., ::2]], dim=-1).flatten(-2)
        return of * tensors["feat_rope.freqs_cos"] + turned * tensors["feat_rope.freqs_sin"]

    def attention(name: str, of: Tensor) -> Tensor:
        batch, count, width = of.shape
        q, k, v = linear(f"{name}.qkv", of).reshape(batch, count, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        scores = rotated(q) @ rotated(k).transpose(2, 3) / math.sqrt(width // heads)
        return linear(f"{name}.proj", (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, count, width))

    def mlp(name: str, of: Tensor) -> Tensor:
        if f"{name}.w12.weight" in tensors:
            a, b = linear(f"{name}.w12", of).chunk(2, dim=-1)
            return linear(f"{name}.w3", F.silu(a) * b)
        return linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", of), approximate="tanh"))

    patch = tensors["x_embedder.proj.weight"].shape[-1]
    grid = F.conv2d(x, tensors["x_embedder.proj.weight"], tensors["x_embedder.proj.bias"], stride=patch)
    side, tokens = grid.shape[-1], grid.flatten(2).transpose(1, 2) + tensors["pos_embed"]
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], dim=1))
    c = F.silu(linear("t_embedder.mlp.2", F.silu(time)) + tensors["y_embedder.embedding_table.weight"][y])
    depth = sum(name.endswith("attn.proj.bias") for name in tensors)
    for i in range(depth):
        six: Any = linear(f"blocks.{i}.adaLN_modulation.1", c)[:, None].chunk(6, dim=-1)
        tokens = tokens + six[2] * attention(
            f"blocks.{i}.attn", norm(f"blocks.{i}.norm1", tokens) * (1 + six[1]) + six[0]
        )
        tokens = tokens + six[5] * mlp(f"blocks.{i}.mlp", norm(f"blocks.{i}.norm2", tokens) * (1 + six[4]) + six[3])
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, dim=-1)
    out = linear("final_layer.linear", norm("final_layer.norm_final", tokens) * (1 + scale) + shift)
    pixels = out.reshape(len(x), side, side, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", pixels).reshape(len(x), -1, side * patch, side * patch)
