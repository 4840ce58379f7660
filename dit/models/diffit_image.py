"""DiffiT on pixels: a U-Net of convolutions and windowed attention (Hatamizadeh et al., arXiv 2312.02139).

    c = SiLU(MLP(sinusoid(ln(sigma) / 4) + augmentation) + label)          the condition
    ResBlock(x, c) = x + Block(Conv3x3(dropout(SiLU(GroupNorm(x)))), c)    Block: TMSA and MLP (`dit.models.tmsa`)

Attention costs the square of the number of tokens, so it works in windows of w x w pixels, which do not overlap; the
convolutions pass information between windows. The image goes down through resolutions, each half of the one before
(stride-2 convolutions), and back up (nearest neighbour and a convolution). At each resolution the way up concatenates
what the way down had. The network is EDM's F (`dit.diffusion.edm`).
"""

# B = batch, C = channels, H, W = height and width of a resolution, E = time width, w = side of a window

import torch
from torch import Tensor, nn

from dit.models.config import HEAD_WIDTH, DiffiTImageConfig
from dit.models.dropout import keyed_dropout
from dit.models.layers import NORM_EPS, LabelEmbedding, check_labels, init_weights, timestep_sinusoid, zero
from dit.models.tmsa import TMSABlock
from storage.errors import InputError

TIME_FREQUENCIES = 64
AUGMENT_NUMBERS = 9
"""Numbers of an augmentation label (arXiv 2206.00364, appendix F.2)."""


class ImageDiffiT(nn.Module):
    """The network inside a preconditioner such as EDM's: scaled noisy images to a raw prediction.

    It works at any image size of which every resolution divides into windows. The model has no random state:
    the caller passes the keys of its dropout.
    """

    def __init__(self, config: DiffiTImageConfig) -> None:
        super().__init__()
        self.config = config
        widths, depths = config.widths, config.depths
        last = len(widths) - 1
        self.t_embedder = TimeToken(config.time_width, config.augmented)
        self.y_embedder = LabelEmbedding(config.num_classes, config.time_width, std=1) if config.num_classes else None
        self.tokenizer = conv3x3(config.in_channels, config.stem_width)
        entries = zip((config.stem_width, *widths), widths, depths, strict=False)
        self.down_stages = nn.ModuleList(Stage(before, width, depth, config) for before, width, depth in entries)
        self.down = nn.ModuleList(conv3x3(width, width, stride=2) for width in widths[:-1])
        self.up = nn.ModuleList(conv3x3(widths[i + 1], widths[i + 1]) for i in range(last))
        self.up_stages = nn.ModuleList(
            Stage(widths[i + 1] + widths[i], widths[i], depths[i], config) for i in range(last)
        )
        self.head = nn.Sequential(group_norm(widths[0]), nn.SiLU(), conv3x3(widths[0], config.in_channels))
        blocks = (module for module in self.modules() if isinstance(module, ResBlock))
        for site, block in enumerate(blocks):
            block.site = site
        self.init_weights()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        augment: Tensor | None = None,
        dropout: Tensor | None = None,
    ) -> Tensor:
        """Predict from scaled noisy images, given in the dtype of the weights.

        Args:
            x: noisy images (B, C, H, W), scaled to unit variance.
            t: the noise level (B,); EDM gives ln(sigma) / 4.
            y: labels (B,) in 0 .. num_classes, the last being the null label; None if unconditional.
            augment: augmentation labels (B, 9), zero where an image is not augmented; None is zeros.
            dropout: random keys (B,), int64, of each sample's dropout; None drops nothing.

        Returns:
            (B, C, H, W)

        Raises:
            InputError: the images do not divide into windows; labels for an unconditional model, or
                none for a conditional one; augmentation labels for a model without them.
        """
        self._check_size(x.shape[2], x.shape[3])
        c = self._condition(t, y, augment, x.dtype)
        x = self.tokenizer(x)
        skips = []
        for stage, down in zip(self.down_stages, self.down, strict=False):
            x = stage(x, c, dropout)
            skips.append(x)
            x = down(x)
        x = self.down_stages[-1](x, c, dropout)
        for i in reversed(range(len(skips))):
            x = self.up[i](nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = self.up_stages[i](torch.cat([x, skips[i]], dim=1), c, dropout)
        out: Tensor = self.head(x)
        return out

    def init_weights(self) -> None:
        """Draw new initial weights from torch's generator, also after `to_empty` of a model made on "meta".

        Xavier-uniform with zero bias; the last Linear of each attention and MLP and the head are zero, labels N(0, 1).
        """
        init_weights(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                zero(module.bias)
            elif isinstance(module, TMSABlock):
                zero(*module.attn.proj.parameters(), *module.mlp.fc2.parameters())
        zero(*self.head[-1].parameters())

    def _condition(self, t: Tensor, y: Tensor | None, augment: Tensor | None, dtype: torch.dtype) -> Tensor:
        check_labels(y, self.config.num_classes)
        time: Tensor = self.t_embedder(t, augment, dtype)
        label = 0 if self.y_embedder is None else self.y_embedder(y)
        return nn.functional.silu(time + label)

    def _check_size(self, height: int, width: int) -> None:
        unit = self.config.window * 2 ** (len(self.config.widths) - 1)
        if height % unit or width % unit:
            reason = f"{len(self.config.widths)} resolutions with windows of {self.config.window} need"
            raise InputError(f"images of {height} x {width} px: {reason} multiples of {unit} px")


class TimeToken(nn.Module):
    """Noise levels (B,) to (B, E) by a sinusoid of 128 numbers and an MLP. The last SiLU follows the label.

    The embedded augmentation label is added to the sinusoid.
    """

    def __init__(self, width: int, augmented: bool) -> None:
        super().__init__()
        self.augment = nn.Linear(AUGMENT_NUMBERS, 2 * TIME_FREQUENCIES, bias=False) if augmented else None
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, augment: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B,) and (B, 9) to (B, E). The sinusoid is computed in float32 and then cast to the weights' dtype."""
        level = timestep_sinusoid(t, TIME_FREQUENCIES).to(dtype)
        if augment is not None:
            if self.augment is None:
                raise InputError("model: takes no augmentation labels (augmented is false); pass none")
            level = level + self.augment(augment.to(dtype))
        out: Tensor = self.mlp(level)
        return out


class Stage(nn.Module):
    """One resolution: a convolution if the width changes, then residual blocks."""

    def __init__(self, in_width: int, width: int, depth: int, config: DiffiTImageConfig) -> None:
        super().__init__()
        self.match = conv3x3(in_width, width) if in_width != width else nn.Identity()
        self.blocks = nn.ModuleList(ResBlock(width, config) for _ in range(depth))

    def forward(self, x: Tensor, c: Tensor, dropout: Tensor | None = None) -> Tensor:
        """(B, in_width, H, W), time (B, E) and keys of dropout (B,) to (B, width, H, W)."""
        x = self.match(x)
        for block in self.blocks:
            x = block(x, c, dropout)
        return x


class ResBlock(nn.Module):
    """A convolution and then a transformer block in windows, added to the input."""

    def __init__(self, width: int, config: DiffiTImageConfig) -> None:
        super().__init__()
        self.window = config.window
        self.norm = group_norm(width)
        self.dropout, self.site = config.dropout, 0
        self.conv = conv3x3(width, width)
        heads = width // HEAD_WIDTH
        self.block = TMSABlock(width, heads, config.time_width, config.window, config.mlp_ratio, config.condition)

    def forward(self, x: Tensor, c: Tensor, dropout: Tensor | None = None) -> Tensor:
        """(B, C, H, W), time (B, E) and keys of dropout (B,) to (B, C, H, W)."""
        h = self.conv(keyed_dropout(nn.functional.silu(self.norm(x)), dropout, self.site, self.dropout))
        tokens = self.block(to_windows(h, self.window), c)
        return x + from_windows(tokens, self.window, x.shape[2], x.shape[3])


def to_windows(x: Tensor, w: int) -> Tensor:
    """(B, C, H, W) to its non-overlapping windows (B * windows, w * w, C), those of an image next to each other."""
    rows, columns = x.shape[2] // w, x.shape[3] // w
    cut: Tensor = x.unflatten(3, (columns, w)).unflatten(2, (rows, w))  # (B, C, rows, w, columns, w)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)


def from_windows(tokens: Tensor, w: int, height: int, width: int) -> Tensor:
    """What `to_windows` cut, (B * windows, w * w, C), put together to (B, C, H, W)."""
    cut: Tensor = tokens.unflatten(1, (w, w)).unflatten(0, (-1, height // w, width // w))
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3 x 3 convolution with zero padding."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)


def group_norm(width: int) -> nn.GroupNorm:
    """Group norm of at least four channels a group, in at most 32 groups."""
    return nn.GroupNorm(min(32, width // 4), width, eps=NORM_EPS)
