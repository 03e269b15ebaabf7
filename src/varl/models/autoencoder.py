"""The convolutional encoder and decoder of VQ-GAN (Esser et al., arXiv 2012.09841), on which tokenizers build.

Module names are those of the published checkpoints of VAR and Switti, and, but for a wrapper, of Infinity. TokenFlow
names and orders levels otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Decoder", "Downsample", "Encoder", "Residual", "Upsample", "group_norm"]


def group_norm(width: int) -> nn.GroupNorm:
    """With 32 groups, or 24 where 32 do not divide the width."""
    return nn.GroupNorm(24 if width % 32 else 32, width, eps=1e-6)


class Residual(nn.Module):
    """Norm, SiLU and a 3x3 convolution, twice, around a skip connection."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + self.nin_shortcut(x)


class PixelAttention(nn.Module):
    """Single-head attention of all cells to all cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.qkv, self.proj_out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + self.proj_out(attended.reshape(x.shape))


class Downsample(nn.Module):
    """Half the size: a column right and a row below of zeros, and a 3x3 convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: nearest neighbours and a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the change of resolution after them.

    Args:
        width, out: channels in and out.
        blocks: how many.
        attention: whether each is followed by attention.
        change: the module after them, by its name.
    """

    def __init__(self, width: int, out: int, blocks: int, attention: bool, **change: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(Residual(width if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(PixelAttention(out) for _ in range(blocks if attention else 0))
        self.change = tuple(change.values())
        for name, module in change.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for module in self.change:
            x = module(x)
        return x


class Middle(nn.Module):
    """Two blocks at the coarsest resolution, and attention between them if it is asked for."""

    def __init__(self, width: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = Residual(width, width)
        self.attn_1 = PixelAttention(width) if attention else nn.Identity()
        self.block_2 = Residual(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] to features [B, out, H / 2^halvings, W / 2^halvings].

    Args:
        channels: at full resolution; level i has ``multipliers[i]`` times as many.
        blocks: residual blocks a level.
        out: channels of the features.
        halvings: the first so many levels end with half the size.
        attention: at the coarsest level, and in the middle.
    """

    def __init__(
        self, channels: int, multipliers: Sequence[int], blocks: int, out: int, halvings: int, attention: bool
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            change = {"downsample": Downsample(width)} if i < halvings else {}
            before = widths[i - 1] if i else channels
            self.down.append(Level(before, width, blocks, attention and i == last, **change))
        self.mid = Middle(widths[-1], attention)
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features [B, inputs, h, w] to pictures [B, 3, 2^doublings h, 2^doublings w], around [-1, 1].

    Args:
        channels, multipliers, blocks, attention: as of the encoder; a level has one block more.
        inputs: channels of the features.
        doublings: levels 1 to ``doublings`` end with twice the size; they run from the last to the first.
    """

    def __init__(
        self, channels: int, multipliers: Sequence[int], blocks: int, inputs: int, doublings: int, attention: bool
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(inputs, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], attention)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            change = {"upsample": Upsample(width)} if 0 < i <= doublings else {}
            self.up.append(Level(widths[min(i + 1, last)], width, blocks + 1, attention and i == last, **change))
        self.norm_out, self.conv_out = group_norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
