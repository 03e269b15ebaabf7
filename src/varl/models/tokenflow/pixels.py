"""The convolutional encoder and decoder of TokenFlow's tokenizer, as in LlamaGen's VQ-GAN (arXiv 2406.06525)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from varl.models.autoencoder import Downsample, Residual, Upsample, group_norm

__all__ = ["PixelDecoder", "PixelEncoder"]


class CellAttention(nn.Module):
    """All cells to all cells, one head of full width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(attended.unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """The blocks of one resolution, and the way to the next.

    Args:
        width, out: channels in and out.
        blocks: how many.
        attention: whether each is followed by attention: at the lowest resolution.
        down, up: how it ends.
    """

    def __init__(
        self, width: int, out: int, blocks: int, attention: bool, down: bool = False, up: bool = False
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(Residual(out if i else width, out) for i in range(blocks))
        self.attn = nn.ModuleList(CellAttention(out) for _ in range(blocks if attention else 0))
        self.downsample = Downsample(out) if down else nn.Identity()
        self.upsample = Upsample(out) if up else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(Residual(width, width), CellAttention(width), Residual(width, width))


class PixelEncoder(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] to [B, z, H / s, W / s], s = 2^(levels - 1)."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, z_channels: int) -> None:
        super().__init__()
        widths, last = [channels * m for m in multipliers], len(multipliers) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.conv_blocks = nn.Sequential(
            *(
                Level(widths[i - 1] if i else channels, width, blocks, attention=i == last, down=i < last)
                for i, width in enumerate(widths)
            )
        )
        self.mid = _middle(widths[-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        x = self.mid(self.conv_blocks(self.conv_in(images_B3HW)))
        return self.conv_out(F.silu(self.norm_out(x)))


class PixelDecoder(nn.Module):
    """[B, z, h, w] to pictures [B, 3, s h, s w], around [-1, 1]; its levels are in order of execution."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, z_channels: int) -> None:
        super().__init__()
        widths, last = [channels * m for m in reversed(multipliers)], len(multipliers) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.Sequential(
            *(
                Level(widths[max(i - 1, 0)], width, blocks + 1, attention=i == 0, up=i < last)
                for i, width in enumerate(widths)
            )
        )
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        x = self.conv_blocks(self.mid(self.conv_in(features_BCHW)))
        return self.conv_out(F.silu(self.norm_out(x)))
